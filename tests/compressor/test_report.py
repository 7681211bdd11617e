"""What a report holds beside the rows of the matrices: spectra and sample texts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.checkpoint.loader import load_model, open_folder
from neuronmlp_plugin.compressor.exhibits import sample_texts, spectra
from neuronmlp_plugin.lowrank.allocate import Curve, Level
from tests.letters import write_tokenizer
from tests.tiny_models import write_dense, write_mixed


def layers(full: int) -> list[list[Level]]:
    tail = np.linspace(2.0, 0.0, full + 1) ** 2
    return [
        [Level(full, 0.0, tuple(Curve(full, 2 * full, scale * tail) for scale in scales))]
        for scales in ((1.0, 2.0, 3.0), (1.0, 5.0, 7.0))
    ]


def test_spectra_are_the_share_that_each_rank_loses():
    found = spectra(layers(10))
    assert found["ranks"] == list(range(11))
    assert [len(layer) for layer in found["layers"]] == [3, 3]
    for layer in found["layers"]:
        for share in layer.values():
            assert share == pytest.approx(np.linspace(1.0, 0.0, 11) ** 2, abs=1e-4)


def test_spectra_of_wide_matrices_stay_small():
    found = spectra(layers(4096))
    assert len(found["ranks"]) == 64 and found["ranks"][0] == 0 and found["ranks"][-1] == 4096
    assert found["layers"][0]["up_proj"][32] == pytest.approx((1 - found["ranks"][32] / 4096) ** 2, rel=1e-3)


def test_a_matrix_of_zeros_loses_nothing_at_any_rank():
    zero = Level(4, 0.0, (Curve(4, 8, np.zeros(5)),) * 3)
    assert spectra([[zero]])["layers"][0]["gate_proj"] == [0.0] * 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folders of two models of one tokenizer that disagree, and the tokenizer."""
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("pair")
    write_tokenizer(write_dense(home / "dense", "llama"))
    write_mixed(home / "mixed", home / "dense")
    return home / "dense", home / "mixed", AutoTokenizer.from_pretrained(home / "dense")


def streams(*folders) -> list[LayerStream]:
    return [LayerStream(*open_folder(folder)) for folder in folders]


def test_samples_are_each_models_own_greedy_text(pair):
    dense, mixed, tokenizer = pair
    ticks = []
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # users have no use for what transformers may think of layers that come and go
        found = sample_texts(*streams(dense, mixed), tokenizer, 5, ticks.append)
    assert (
        found["new_tokens"] == 5 and found["chat_template"] and len(found["texts"]) == 4 and len(ticks) == 10
    )
    models = load_model(dense), load_model(mixed)
    for entry in found["texts"]:
        ids = tokenizer(f"user:{entry['prompt']};", add_special_tokens=False)["input_ids"]
        for model, text in zip(models, (entry["dense"], entry["compressed"]), strict=True):
            assert text == tokenizer.decode(greedy(model, ids, 5), skip_special_tokens=True)
    assert any(entry["dense"] != entry["compressed"] for entry in found["texts"])
    assert found == sample_texts(*streams(dense, mixed), tokenizer, 5, ticks.append)


def test_one_layer_at_a_time_is_in_memory(pair):
    """Whenever a layer runs, no other layer has weights; afterwards none has, nor has the head."""
    dense, mixed, tokenizer = pair
    both = streams(dense, mixed)
    seen = []

    def loaded(stream):
        return [
            i for i, layer in enumerate(stream.model.model.layers) if not next(layer.parameters()).is_meta
        ]

    for stream in both:
        for layer in stream.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, stream=stream: seen.append(loaded(stream)))
    sample_texts(*both, tokenizer, 2, lambda _: None)
    assert seen == [[0], [1], [2]] * 4
    assert [loaded(stream) for stream in both] == [[], []]
    assert all(stream.model.lm_head.weight.is_meta for stream in both)


def test_streams_still_judge_after_their_samples(pair):
    dense, mixed, tokenizer = pair
    windows = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    both = streams(dense, mixed)
    before = Judge(both[0], windows).compare(both[1])
    sample_texts(*both, tokenizer, 1, lambda _: None)
    assert Judge(both[0], windows).compare(both[1]) == before


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """The obvious twin: the most likely token, again and again."""
    new: list[int] = []
    while len(new) < count and model.config.eos_token_id not in new:
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("template", [None, "{{ raise_exception('system only') }}", "{{ broken"])
def test_without_a_usable_chat_template_texts_are_gone_on_from(pair, monkeypatch, template):
    dense, mixed, tokenizer = pair
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = sample_texts(*streams(dense, mixed), tokenizer, 2, lambda _: None)
    assert not found["chat_template"] and not any(entry["prompt"].endswith("?") for entry in found["texts"])
    ids = tokenizer(found["texts"][0]["prompt"])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert found["texts"][0]["dense"] == tokenizer.decode(
        greedy(load_model(dense), ids, 2), skip_special_tokens=True
    )
