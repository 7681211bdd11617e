"""What is served is finite: tensors in the dtype that they are served in, and logits, request by request."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.checkpoint.writer import write_layer, write_rest
from neuronmlp_plugin.errors import NonFiniteError
from neuronmlp_plugin.models.factors import DENSE, MLPLayer
from tests.serving.engine import PROMPTS, environment, run_engine, served_logits
from tests.tiny_models import SHAPE, write_dense, write_mixed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
    ),
]
POISON = 77
_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts = json.loads(sys.argv[1])
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=4, enforce_eager=True,
              num_gpu_blocks_override=5)  # one is vLLM's own, and four requests use all others again
    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
    done = [output.outputs[0] for batch in prompts for output in
            llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)]
    print("RESULT" + json.dumps([[list(output.token_ids), output.finish_reason] for output in done]))
"""


def edit(folder, name, value):
    """Put `value` in the place of a tensor, or what it makes of it."""
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name] = value(tensors[name]) if callable(value) else value
    save_file(tensors, path, metadata={"format": "pt"})


def poisoned(folder):
    """A dense model in which one token, and nothing else, makes an MLP overflow in fp32."""
    base = write_dense(folder, "qwen2")  # its head is its own

    def alone(embedding):
        embedding[:, 0] = 0
        embedding[POISON] = 0
        embedding[POISON, 0] = 1
        return embedding

    def quiet(weight):  # nobody else writes to the first channel
        weight[0] = 0
        return weight

    def loud(weight):
        weight[5] = 0
        weight[5, 0] = 1e20
        return weight

    edit(base, "model.embed_tokens.weight", alone)
    for index in range(SHAPE.num_layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            edit(base, f"model.layers.{index}.{name}.weight", quiet)
    for name in ("gate", "up"):
        edit(base, f"model.layers.0.mlp.{name}_proj.weight", loud)
    return base


def passed_through(folder, base_folder):
    """A folder of the format whose matrices are all the base's own."""
    base = Checkpoint(base_folder)
    folder.mkdir()
    layers = (MLPLayer(SHAPE.hidden_size, SHAPE.intermediate_size, *[DENSE] * 3),) * SHAPE.num_layers
    for index in range(SHAPE.num_layers):
        mine = f"model.layers.{index}.mlp."
        write_layer(folder, base, index, {n: base.tensor(n) for n in base.names() if n.startswith(mine)})
    write_rest(folder, base, FormatBlock(layers, SHAPE, {}, "neuronmlp tests"))
    return folder


def test_a_request_of_logits_that_are_not_finite_ends_with_an_error_and_others_go_on(tmp_path):
    folder = passed_through(tmp_path / "folder", poisoned(tmp_path / "dense"))
    # Attention reads 16 places of the cache at once: of the last, NaN stays behind what a short prompt writes.
    loud, short = [9] * 13 + [POISON, 9], PROMPTS[1]
    batches = [PROMPTS, [PROMPTS[0], loud, short, PROMPTS[2]], [short] * 4, PROMPTS]
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps([str(folder), batches])],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    line = next(line for line in process.stdout.splitlines() if line.startswith("RESULT"))
    done = json.loads(line.removeprefix("RESULT"))
    alone = [tokens for tokens, _ in done[:3]]
    assert [reason for _, reason in done] == ["length"] * 4 + ["error"] + ["length"] * 9
    assert done[4][0] == []
    assert [done[3][0], done[5][0], done[6][0]] == alone
    assert [tokens for tokens, _ in done[7:]] == [alone[1]] * 4 + alone
    assert "expected finite logits, found NaN or Inf" in process.stdout + process.stderr


def test_a_vllm_that_cannot_stop_by_itself_is_stopped(monkeypatch):
    from vllm import envs

    from neuronmlp_plugin.serving.cpu.finite import RAISE, marked

    def logits():
        return torch.tensor([[1.0, float("inf")], [1.0, 2.0]])

    monkeypatch.setenv(RAISE, "1")
    monkeypatch.setitem(envs.environment_variables, RAISE, lambda: True)
    assert torch.isnan(marked(logits())).tolist() == [[True, True], [False, False]]
    monkeypatch.delitem(envs.environment_variables, RAISE)
    with pytest.raises(NonFiniteError, match="expected finite values, found NaN or Inf"):
        marked(logits())


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.0.mlp.up_proj.u.weight"],
)
def test_what_overflows_in_the_served_dtype_is_refused_at_the_start(tmp_path, name):
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"))
    edit(folder, name, lambda tensor: tensor.index_fill(0, torch.tensor([1]), 1e6))
    process = run_engine(folder, dtype="float16")
    assert process.returncode != 0 and "RESULT" not in process.stdout
    assert "expected finite values in torch.float16, as it is served" in process.stdout + process.stderr


@pytest.mark.slow
def test_a_matrix_that_stays_dense_is_served_bit_for_bit(tmp_path):
    dense = write_dense(tmp_path / "dense", "llama")
    folder = passed_through(tmp_path / "folder", dense)
    plain = served_logits(folder, additional_config={"neuronmlp": {"fast_path": False}})
    for (tokens, logits), (expected_tokens, expected) in zip(plain, served_logits(dense), strict=True):
        assert tokens == expected_tokens and torch.equal(logits, expected)
