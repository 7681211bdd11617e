"""The real NxD Inference, in its CPU mode, gives the logits and the greedy tokens of the checkpoint's plain
torch forward.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.serving.trainium.sharding import partition_dim
from neuronmlp_plugin.serving.trainium.state_dict import lay_out_state, read_factored
from tests.loopback import free_port
from tests.models.layers import in_int8
from tests.serving.trainium.nxdi_cases import PROMPT_LENGTHS, Case, family_cases, grouped_cases
from tests.tiny_models import FAMILIES, MIXED_LAYERS, grouped_layers, write_dense, write_mixed

pytestmark = [
    pytest.mark.nxdi,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("neuronx_distributed_inference", "neuronx_distributed")
        ),
        reason="needs the public sources of NxDI and NxD on PYTHONPATH (docs/trainium.md, Tests)",
    ),
]
ROOT = pathlib.Path(__file__).parents[3]


def run_cases(cases: list[Case], tp: int, work: pathlib.Path, classes: str = "ours") -> dict:
    """Run all cases in one process per rank and return rank 0's results by case name; `classes`: see
    nxdi_worker.
    """
    cases_path, results_path = work / "cases.json", work / "results.pt"
    cases_path.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.serving.trainium.nxdi_worker",
        str(cases_path),
        str(results_path),
        classes,
    ]
    port = str(free_port())
    ranks = []
    for rank in range(tp):
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        if tp > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(tp), "LOCAL_RANK": str(rank)}
        log = (work / f"rank{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
    deadline = time.monotonic() + 900
    while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
        assert time.monotonic() < deadline, f"no result within 900 s, see {work}"
        time.sleep(0.2)
    codes = [process.poll() for process in ranks]
    for process in ranks:
        process.kill()
    logs = [(work / f"rank{rank}.log").read_text()[-3000:] for rank, code in enumerate(codes) if code]
    assert codes == [0] * tp, "\n".join(logs)
    return torch.load(results_path, weights_only=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("nxdi")
    return {
        family: str(write_mixed(root / f"{family}-mixed", write_dense(root / family, family)))
        for family in FAMILIES
    }


@torch.no_grad()
def assert_like_torch(results: list[tuple[torch.Tensor, torch.Tensor]], model) -> None:
    """Logits within 1e-4 in fp32 and the same greedy choice, for every sequence of the batch and every new
    token.
    """
    assert results
    for (tokens, logits), length in zip(results, PROMPT_LENGTHS, strict=False):
        expected = model(tokens[None, :-1]).logits[0, length - 1 :]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(expected.argmax(-1), tokens[length:])


@pytest.mark.parametrize("tp", [1, 2])
def test_every_family_and_batch_equals_the_torch_forward(tp, folders, tmp_path):
    cases = family_cases(folders, tp)
    results = run_cases(cases, tp, tmp_path)
    assert len(results) == len(cases) == (8 if tp == 1 else 16)
    models = {family: load_model(folder) for family, folder in folders.items()}
    for case in cases:
        try:
            assert_like_torch(results[case.name], models[case.family])
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error


@pytest.fixture(scope="module")
def grouped_folders(tmp_path_factory) -> dict[str, str]:
    """1, 2, 4 and 8 groups; all layers narrow but one, forms mixed, one layer dense throughout; fp32 and
    int8.
    """
    root = tmp_path_factory.mktemp("grouped")
    dense = write_dense(root / "dense", "llama")
    made = {}
    for groups in (1, 2, 4, 8):
        for name, int8 in (("float", False), ("int8", True)):
            layers = grouped_layers(groups, int8)
            made[f"{name}-{groups}"] = str(write_mixed(root / f"{name}-{groups}", dense, layers=layers))
    return made


@pytest.mark.parametrize(("tp", "served"), [(1, 8), (2, 8), (4, 6)])
def test_groups_narrow_layers_and_int8_equal_the_torch_forward(tp, served, grouped_folders, tmp_path):
    cases = grouped_cases(grouped_folders, tp)
    assert len(cases) == served
    results = run_cases(cases, tp, tmp_path)
    for case in cases:
        try:
            assert_like_torch(results[case.name], load_model(case.folder))
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error


def test_a_size_that_the_groups_cannot_serve_is_refused_before_anything_is_loaded(grouped_folders, tmp_path):
    with pytest.raises(AssertionError, match="tensor parallel size 4: expected a size that serves this MLP"):
        run_cases([Case("two", "llama", grouped_folders["float-2"], 4, 1, {})], 4, tmp_path)


def test_a_dense_model_is_served_bit_for_bit_as_by_the_stock_class(tmp_path):
    """With our classes installed and without: same JSON key, same logits."""
    folder = str(write_dense(tmp_path / "dense", "qwen3"))
    case = Case("dense", "qwen3", folder, 1, 3, None)
    (ours,) = run_cases([case], 1, tmp_path).values()
    (stock,) = run_cases([case], 1, tmp_path, classes="stock").values()
    for (tokens, logits), (stock_tokens, stock_logits) in zip(ours, stock, strict=True):
        assert torch.equal(tokens, stock_tokens)
        assert torch.equal(logits, stock_logits)


def test_nxdi_itself_may_pass_the_norm_to_the_mlp(folders, tmp_path):
    """`mlp_kernel_enabled` makes Llama's decoder layer leave the norm to the MLP, and with
    `..._fuse_residual_add` the residual too.
    """
    fused = {"mlp_kernel_enabled": True, "mlp_kernel_fuse_residual_add": True}
    cases = [
        Case("norm", "llama", folders["llama"], 1, 3, {}, {"mlp_kernel_enabled": True}),
        Case("norm-residual", "llama", folders["llama"], 1, 3, {}, fused),
    ]
    model = load_model(folders["llama"])
    for results in run_cases(cases, 1, tmp_path).values():
        assert_like_torch(results, model)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_kernels_run_inside_nxdi_in_the_simulator(tp, folders, tmp_path):
    """NxDI's own sharding, rank and collectives around the kernels, every launch of every layer simulated."""
    required, sequence_parallel = {"kernels": "require"}, {"sequence_parallel_enabled": tp > 1}
    cases = [
        Case(family, family, folders[family], tp, 2, required, sequence_parallel)
        for family in ("llama", "qwen2")
    ]
    cases.append(
        Case("norm", "llama", folders["llama"], tp, 2, required, {"mlp_kernel_enabled": True})
    )  # RMSNorm in the kernels, too
    results = run_cases(cases, tp, tmp_path, classes="simulated")
    for case in cases:
        assert_like_torch(results[case.name], load_model(case.folder))


@pytest.fixture(scope="module")
def int8_folders(tmp_path_factory) -> dict[str, str]:
    """int8 throughout: layers of one group, which tp 2 shares by `gather` (45 pivots of one down: expanded
    there), and narrow layers of two groups.
    """
    root = tmp_path_factory.mktemp("int8")
    dense = write_dense(root / "dense", "llama")
    kinds = {"one": MIXED_LAYERS, "two": grouped_layers(2)}
    return {
        name: str(write_mixed(root / name, dense, layers=tuple(map(in_int8, layers))))
        for name, layers in kinds.items()
    }


@pytest.mark.parametrize("classes", ["simulated", "ours"])
@pytest.mark.parametrize("tp", [1, 2])
def test_int8_is_served_from_one_byte_a_weight(tp, classes, int8_folders, tmp_path):
    """Kernels, simulated, and torch operations: the logits of the dequantised checkpoint."""
    uneven, whole = ["int8", "float32"], ["int8"]
    options = {"kernels": "auto"}
    cases = [
        Case("one", "llama", int8_folders["one"], tp, 2, options, {}, whole if tp == 1 else uneven),
        Case("two", "llama", int8_folders["two"], tp, 2, {}, {"sequence_parallel_enabled": tp > 1}, whole),
    ]
    if classes == "simulated":
        cases[1] = dataclasses.replace(cases[1], neuronmlp={"kernels": "require"})
        norm = {"mlp_kernel_enabled": True}  # RMSNorm in the kernels, before the scales
        cases.append(Case("norm", "llama", int8_folders["two"], tp, 2, {"kernels": "require"}, norm, whole))
    results = run_cases(cases, tp, tmp_path, classes=classes)
    for case in cases:
        assert_like_torch(results[case.name], load_model(case.folder))


def test_int8_scales_stay_fp32_in_a_bf16_model(int8_folders, tmp_path):
    """NxDI's CPU mode calls `bfloat16()` on the whole model, and restores no scale."""
    case = Case("bf16", "llama", int8_folders["two"], 1, 1, {}, {"torch_dtype": "bfloat16"}, ["int8"])
    ((tokens, logits),) = run_cases([case], 1, tmp_path)["bf16"]
    expected = load_model(case.folder)(tokens[None, :-1]).logits[0, PROMPT_LENGTHS[0] - 1 :]
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.05


def test_required_kernels_that_would_expand_int8_are_refused_by_nxdi_at_once(int8_folders, tmp_path):
    case = Case("one", "llama", int8_folders["one"], 2, 1, {"kernels": "require"})
    with pytest.raises(AssertionError, match="2 ranks share the 45 pivots of down_proj unevenly"):
        run_cases([case], 2, tmp_path, classes="simulated")


def test_factors_over_a_dense_folder_that_transformers_5_saved(tmp_path):
    """Its config has `rope_parameters` alone, its theta is not the default, and the venv has transformers
    4.
    """
    dense = write_dense(tmp_path / "dense", "llama")
    mixed = Checkpoint(write_mixed(tmp_path / "mixed", dense))
    names = mixed.block.expected_tensors(only_changed=True)
    factors = tmp_path / "factors.safetensors"
    write_factor_file(factors, mixed.block, {name: mixed.tensor(name) for name in names})
    config = json.loads((dense / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype"):
        config.pop(name, None)
    five = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}, "dtype": "float32"}
    (dense / "config.json").write_text(json.dumps(five))
    (results,) = run_cases(
        [Case("five", "llama", str(dense), 1, 1, {"factors": str(factors)})], 1, tmp_path
    ).values()
    four = {**config, "rope_theta": 3e5, "torch_dtype": "float32"}
    (dense / "config.json").write_text(json.dumps(four))
    assert_like_torch(results, load_model(dense, factors=factors))


def test_the_stock_class_cannot_serve_a_factored_folder(folders, tmp_path):
    """The negative control: without our classes NxDI fails on the same folder, rather than fill in random
    weights.
    """
    case = Case("stock", "llama", folders["llama"], 1, 1, None)
    with pytest.raises(AssertionError, match=r"Can not find model\.safetensors"):
        run_cases([case], 1, tmp_path, classes="stock")


def test_the_wrong_factors_would_be_noticed(folders, tmp_path):
    """The comparison has teeth: the same model with other factors is far outside its bound."""
    other = write_mixed(tmp_path / "other", pathlib.Path(folders["llama"]).parent / "llama", seed=5)
    (results,) = run_cases([Case("llama", "llama", folders["llama"], 1, 1, {})], 1, tmp_path).values()
    with pytest.raises(AssertionError, match="not close"):
        assert_like_torch(results, load_model(other))


def shards_of(folder: pathlib.Path, tp: int, dtype: str, out: pathlib.Path) -> list[dict]:
    """What `ModelBuilder.shard_checkpoint` writes for each rank, in one process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving.trainium.nxdi_shard_worker"]
    command += [str(folder), str(tp), str(out), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(out / f"tp{rank}_sharded_checkpoint.safetensors") for rank in range(tp)]


def test_nxd_cuts_int8_and_leaves_its_scales_in_fp32(int8_folders, tmp_path):
    """In a bf16 model: scales with the rows, but those of down's last factor whole at every rank."""
    folder = pathlib.Path(int8_folders["two"])
    shards = shards_of(folder, 2, "bfloat16", tmp_path / "out")
    state, block = read_factored(str(folder)), Checkpoint(folder).block
    lay_out_state(state, block, [{"torch"}] * block.shape.num_layers, 2, torch.bfloat16, "test")
    names = [name for name in state if ".mlp." in name]
    assert all({n for n in shard if ".mlp." in n} == set(names) for shard in shards)
    for name in names:
        *_, index, _, _, projection, part, leaf = name.split(".")
        dim = partition_dim(block.layers[int(index)].matrix(projection), part, False)
        parts = [shard[name] for shard in shards]
        assert {p.dtype for p in parts} == {torch.int8 if leaf == "weight" else torch.float32}
        if leaf == "scale" and dim == 1:
            assert all(torch.equal(p, state[name]) for p in parts)
        else:
            assert torch.equal(torch.cat(parts, dim if leaf == "weight" else 0), state[name])


def test_nxd_cuts_eight_ranks_as_the_layout_says(tmp_path):
    """Equal shapes, the layout's values, zeros where a rank has a slot too many."""
    folder = write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"))
    shards = shards_of(folder, 8, "float32", tmp_path / "out")
    state, block = read_factored(str(folder)), Checkpoint(folder).block
    lay_out_state(state, block, [{"torch"}] * block.shape.num_layers, 8, torch.float32, "test")
    names = [name for name in state if ".mlp." in name]
    assert names and all({n for n in shard if ".mlp." in n} == set(names) for shard in shards)
    for name in names:
        *_, index, _, _, projection, part, _ = name.split(".")
        dim = partition_dim(block.layers[int(index)].matrix(projection), part, True)
        assert torch.equal(torch.cat([shard[name] for shard in shards], dim), state[name])
        assert len({shard[name].shape for shard in shards}) == 1
    first = [
        shard["layers.0.mlp.torch_path.gate_proj.first.weight"] for shard in shards
    ]  # rank 37 over 8 ranks: 5 slots each
    assert [bool(slots[4].any()) for slots in first] == [True] * 5 + [False] * 3


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("tp", [1, 3])
@torch.no_grad()
def test_the_real_compressed_model_equals_the_torch_forward(tp, smollm2_compressed, tmp_path):
    """SmolLM2 has nine heads and three of K and V, which one and three ranks can share.

    Its logits reach 35, and the plain fp32 forward is itself up to 1.1e-4 from float64 (4e-5 and 6e-5 on the
    other two prompts). So the bound is twice the largest of these (measured at tp 3: 8.3e-5, 9.5e-5, 1.0e-4),
    and the greedy choices of float64 must be met at every token.
    """
    case = Case("real", "llama", str(smollm2_compressed), tp, 3, {})
    plain, exact = load_model(smollm2_compressed), load_model(smollm2_compressed, dtype=torch.float64)
    (results,) = run_cases([case], tp, tmp_path).values()
    rounding, distance = [], []
    for (tokens, logits), length in zip(results, PROMPT_LENGTHS, strict=True):
        reference = exact(tokens[None, :-1]).logits[0, length - 1 :]
        assert torch.equal(reference.argmax(-1), tokens[length:])
        rounding.append(float((plain(tokens[None, :-1]).logits[0, length - 1 :] - reference).abs().max()))
        distance.append(float((logits - reference).abs().max()))
    assert max(distance) <= 2 * max(rounding)


def test_registration_edits_nothing_but_the_four_families_and_only_once():
    code = """
from tests.serving.trainium import neuron_wheels; neuron_wheels.install()
import sys, neuronmlp_plugin
neuronmlp_plugin.register()
assert "neuronx_distributed_inference" not in sys.modules
from neuronx_distributed_inference.utils.constants import MODEL_TYPES
first = {key: tasks["causal-lm"] for key, tasks in MODEL_TYPES.items()}
neuronmlp_plugin.register()
assert first == {key: tasks["causal-lm"] for key, tasks in MODEL_TYPES.items()}
print(sorted(key for key, cls in first.items() if cls.__module__.startswith("neuronmlp_plugin") or cls.__name__.startswith("LowRank")))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(sorted(FAMILIES))
