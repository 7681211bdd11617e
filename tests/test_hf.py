"""transformers loads factored folders by itself once the module is imported, and stops with an error
before.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError
from tests.tiny_models import INT8_LAYERS, MIXED_LAYERS, grouped_layers, write_dense, write_mixed

hf = pytest.importorskip("neuronmlp_plugin.hf")
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "mixed": MIXED_LAYERS,
    "int8": INT8_LAYERS,
    "2 groups": grouped_layers(2),
    "4 groups, int8": grouped_layers(4, int8=True),
}


@pytest.fixture(params=LAYERS)
def folder(request, tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    return write_mixed(tmp_path / "mixed", base, layers=LAYERS[request.param])


@pytest.fixture
def mixed(tmp_path):
    return write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "qwen3"))


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def test_logits_are_those_of_our_own_loader(folder):
    model = load(folder, dtype=torch.float32)
    expected = load_model(folder)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(model.config, "transformers_weights")
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 15)


@torch.no_grad()
def test_dequantize_gives_ordinary_matrices(folder):
    model = load(folder, dtype=torch.float32)
    expected = model(IDS).logits
    plain = model.dequantize()
    assert {type(m) for m in plain.model.layers[0].mlp.children() if hasattr(m, "weight")} == {
        torch.nn.Linear
    }
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(folder.parent / "plain")
    assert Checkpoint(folder.parent / "plain").block is None
    again = load(folder.parent / "plain")(IDS).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_without_a_head_a_subfolder_and_a_config_by_hand(mixed):
    from transformers import AutoModel, Qwen3Config

    expected = load_model(mixed)(IDS, output_hidden_states=True)
    states = AutoModel.from_pretrained(mixed, dtype=torch.float32)(IDS).last_hidden_state
    torch.testing.assert_close(states, expected.hidden_states[-1], rtol=1e-5, atol=1e-5)
    config = Qwen3Config(**json.loads((mixed / "config.json").read_text()))
    for model in (load(mixed.parent, subfolder=mixed.name), load(mixed, config=config)):
        torch.testing.assert_close(model(IDS).logits, expected.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_and_a_device_map(folder):
    model = load(folder, dtype=torch.bfloat16, device_map="cpu")
    floats = {
        p.dtype for n, p in model.named_parameters() if p.dtype not in (torch.int8,) and "scale" not in n
    }
    assert floats == {torch.bfloat16}
    expected = load_model(folder)(IDS).logits
    assert float((model(IDS).logits.float() - expected).norm() / expected.norm()) < 0.05


def test_without_the_import_the_folder_stops_with_an_error(mixed):
    program = (
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(mixed)!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError" in done.stderr and "safetensors" in done.stderr


def test_a_damaged_folder_is_refused_by_our_reader(mixed):
    shard = next(iter(sorted(mixed.glob("neuronmlp-*.safetensors"))))
    tensors = load_file(shard)
    name = next(name for name in tensors if ".mlp." in name)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load(mixed)


def test_what_it_would_write_would_load_as_random_numbers_so_it_does_not(mixed, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(mixed).save_pretrained(tmp_path / "out")


def test_it_registers_once():
    hf.register()
    hf.register()


@pytest.mark.parametrize("layers", [MIXED_LAYERS, INT8_LAYERS], ids=["float", "int8"])
def test_adapters_of_peft_are_heard(tmp_path, layers):
    peft = pytest.importorskip("peft")
    mixed = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "qwen3"), layers=layers)
    model = load(mixed, dtype=torch.float32)
    before = model(IDS).logits.detach()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=r".*mlp\..*\.(u|v|c)", init_lora_weights=False)
    )
    assert not torch.allclose(adapted(IDS).logits, before)
    adapted(IDS).logits.sum().backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
