"""int8 folders on Trainium: every rank gives the answer of the dequantised weights from one byte a weight,
and where a weight must be expanded the decision says so.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError, UsageError
from neuronmlp_plugin.models.definition import mlp
from neuronmlp_plugin.models.factors import INT8, PROJECTIONS, SCALE, MLPLayer, MLPShape, ProjectionSpec
from neuronmlp_plugin.models.gather import Collectives
from neuronmlp_plugin.serving.trainium import trial
from neuronmlp_plugin.serving.trainium.config import low_rank_config
from neuronmlp_plugin.serving.trainium.dispatch import Decision, DispatchRecord, decide
from neuronmlp_plugin.serving.trainium.kernel_path import declined, stage_layouts
from neuronmlp_plugin.serving.trainium.neuron_options import Options
from neuronmlp_plugin.serving.trainium.sharding import (
    EXPANDED,
    FLOATING,
    IN_PART,
    kernel_reading,
    torch_reading,
)
from neuronmlp_plugin.serving.trainium.state_dict import lay_out_state, overlay_factors, read_factored
from nki_kernels.packing import pack_norm
from tests.checkpoint.test_folder import edit_shard
from tests.models.layers import MIXES, RANKS, in_int8, mix_layer, random_modules, stored_tensors
from tests.serving.trainium.sharded import KERNEL, TORCH, rank_mlp, run_kernels
from tests.serving.trainium.stand_ins import InferenceConfig, load_values
from tests.thread_group import ThreadGroup
from tests.tiny_models import INT8_LAYERS, MIXED_LAYERS, SHAPE, write_dense, write_mixed

EVEN = {**RANKS, "down_proj": 12}  # which 2 and 3 ranks share
SOME_MIXES = [*MIXES[::5], ("compact", "compact", "compact")]
WHOLE = MLPLayer(512, 1536, *(ProjectionSpec("dense"),) * 3)


def made(layer: MLPLayer):
    """(layer in int8, its tensors by projection and suffix)."""
    return in_int8(layer), stored_tensors(in_int8(layer), random_modules(layer))


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("mix", SOME_MIXES, ids="-".join)
def test_kernels_read_int8_at_every_rank(mix, tp):
    """One group: above one rank scheme `gather`, whose pivots are shared evenly here."""
    layer, tensors = made(mix_layer(mix, ranks=EVEN))
    x = torch.randn(2, 3, layer.hidden_size)
    ran = run_kernels(layer, tensors, tp, x)
    for y in ran.outputs:
        close(y, mlp(layer, tensors, x), 1e-4)
    assert_reads_int8(ran)


def assert_reads_int8(ran):
    """Every launch of rank 0: int8 weights, fp32 scales behind, no other tensor but x, z and a norm."""
    for arguments in ran.arguments:
        dtypes = [a.dtype for a in arguments if isinstance(a, torch.Tensor)]
        assert dtypes.count(torch.int8) == 1 and dtypes[-1] is torch.float32


@pytest.mark.parametrize(("tp", "groups"), [(2, 2), (3, 3), (2, 4), (3, 6)])
@pytest.mark.parametrize("mix", SOME_MIXES[::2], ids="-".join)
def test_ranks_that_own_groups_run_one_launch_from_int8(mix, tp, groups):
    """Narrow: 36 of the 48 channels."""
    layer, tensors = made(mix_layer(mix, ranks=dict.fromkeys(RANKS, 5), channels=36, groups=groups))
    x = torch.randn(2, 3, layer.hidden_size)
    ran = run_kernels(layer, tensors, tp, x)
    for y in ran.outputs:
        close(y, mlp(layer, tensors, x), 1e-4)
    assert ran.launches == ["svd_mlp"] and ran.collectives == [("all_reduce", x.numel() * 4)]
    assert_reads_int8(ran)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_norm_goes_before_the_scales(tp):
    layer, tensors = made(mix_layer(("compact", "uv", "compact"), ranks=EVEN))
    norm = torch.nn.RMSNorm(layer.hidden_size, eps=0.01)
    norm.variance_epsilon = 0.01  # NxDI's name
    x = torch.randn(2, 3, layer.hidden_size)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        expected = mlp(layer, tensors, norm(x))
    ran = run_kernels(layer, tensors, tp, x, norm)
    for y in ran.outputs:
        close(y, expected, 1e-4)
    packed = torch.from_numpy(pack_norm(norm.weight.detach().numpy()))
    assert torch.equal(ran.arguments[0][3], packed)


def test_activations_stay_bf16_beside_int8():
    layer, tensors = made(mix_layer(("compact", "uv", "compact"), ranks=EVEN))
    x = torch.randn(1, 5, layer.hidden_size).bfloat16()
    (y,) = run_kernels(layer, tensors, 1, x).outputs
    expected = mlp(layer, tensors, x.float())
    assert y.dtype is torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("groups", "tp"), [(1, 1), (1, 2), (1, 3), (1, 16), (2, 2), (4, 2)])
@pytest.mark.parametrize("mix", SOME_MIXES, ids="-".join)
def test_torch_multiplies_int8_at_every_rank(mix, groups, tp):
    """One group with 11 pivots of down: unevenly shared, so that a compact down is expanded there."""
    stored = mix_layer(mix) if groups == 1 else mix_layer(mix, ranks=dict.fromkeys(RANKS, 3), groups=groups)
    layer, tensors = made(stored)
    x, group = torch.randn(2, 5, layer.hidden_size, dtype=torch.float64), ThreadGroup(tp)
    reading = torch_reading(layer, tp, torch.float64)
    uneven = groups == 1 and tp > 1 and mix[2] == "compact"
    assert reading.int8 == set(PROJECTIONS) - ({"down_proj"} if uneven else set())

    @torch.no_grad()
    def work(collectives: Collectives):
        rank = rank_mlp(layer, tensors, collectives, TORCH, torch.float64)
        for name in PROJECTIONS:
            wanted = torch.int8 if name in reading.int8 else torch.float64
            held = rank.torch_path.get_submodule(name).named_parameters()
            assert {p.dtype for n, p in held if n.endswith("weight")} == {wanted}
        return rank(x)[0]

    wide = {
        name: {suffix: t.double() if SCALE in suffix else t for suffix, t in tensors[name].items()}
        for name in tensors
    }
    for y in group.run(work):
        close(y, mlp(layer, wide, x), 1e-5)  # where expanded, products of q and scale are rounded to fp32


@pytest.mark.parametrize("decisions", [KERNEL, TORCH], ids=["kernel", "torch"])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_wider_copy_of_an_int8_weight_is_kept(decisions, tp):
    """Bytes of all that a rank holds: one a weight, the kernels' identity, and four a scale."""
    layer, tensors = made(WHOLE)
    rank = rank_mlp(layer, tensors, ThreadGroup(tp).run(lambda c: c)[0], decisions, torch.bfloat16)
    kinds = {p.dtype: 0 for p in rank.parameters()}
    for parameter in rank.parameters():
        kinds[parameter.dtype] += parameter.nbytes
    kernel = decisions is KERNEL
    channels = 2 * 1536 // tp + 512  # outputs of gate, up and down
    assert kinds == {
        torch.int8: layer.parameters // tp + (128 * 128 if kernel else 0),
        torch.float32: 4 * channels,
    }
    assert not list(rank.buffers())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`part`: int8 and floating point in every layer; `all`: int8 throughout; `float`."""
    root = tmp_path_factory.mktemp("int8")
    dense = write_dense(root / "dense", "llama")
    kinds = {"part": INT8_LAYERS, "all": tuple(map(in_int8, MIXED_LAYERS)), "float": MIXED_LAYERS}
    return {name: write_mixed(root / name, dense, layers=layers) for name, layers in kinds.items()} | {
        "dense": dense
    }


def laid_out(folder, paths, tp=1, dtype=torch.bfloat16, change=lambda state: None):
    state, block = read_factored(str(folder)), Checkpoint(folder).block
    change(state)
    lay_out_state(state, block, [paths] * SHAPE.num_layers, tp, dtype, str(folder))
    return {name: tensor for name, tensor in state.items() if ".mlp." in name}


def test_a_folder_of_int8_stays_int8_in_the_state_that_nxdi_gets(folders):
    """Under names that NxDI leaves in fp32: those that end in "scale"."""
    state = laid_out(folders["all"], {"torch", "kernel"})
    assert {t.dtype for name, t in state.items() if name.endswith(".weight")} == {torch.int8}
    scales = {name: t for name, t in state.items() if not name.endswith(".weight")}
    assert {t.dtype for t in scales.values()} == {torch.float32}
    assert {name.rpartition(".")[2] for name in scales} == {"scale"} and len(scales) == len(state) // 2
    stored = sum(layer.parameters for layer in MIXED_LAYERS)
    assert (
        sum(t.nbytes for name, t in state.items() if ".torch_path." in name and t.dtype is torch.int8)
        == stored
    )


def test_a_mixed_layer_is_expanded_for_the_kernels_and_int8_in_part_for_torch(folders):
    state = laid_out(folders["part"], {"torch", "kernel"})
    block = Checkpoint(folders["part"]).block
    for index, layer in enumerate(block.layers):
        prefix = f"layers.{index}.mlp."
        assert state[f"{prefix}kernel_path.whole.weight"].is_floating_point()
        for name, spec in layer.items():
            held = [t for n, t in state.items() if n.startswith(f"{prefix}torch_path.{name}.")]
            assert any(t.dtype is torch.int8 for t in held) == spec.is_int8
        assert kernel_reading(layer, 1).weights == EXPANDED
        assert torch_reading(layer, 1, torch.bfloat16).weights == IN_PART


def test_what_is_expanded_is_the_dequantised_weight_in_the_models_dtype(folders):
    """float16 for torch operations: sums of unscaled integers may leave its range."""
    state = laid_out(folders["all"], {"torch"}, dtype=torch.float16)
    plain = dict(Checkpoint(folders["all"]).tensors())
    for name, tensor in state.items():
        assert tensor.dtype is torch.float16 and name.endswith(".weight")
    up = state["layers.0.mlp.torch_path.up_proj.first.weight"]
    assert torch.equal(up, plain["model.layers.0.mlp.up_proj.u.weight"].half())


def test_a_factor_file_brings_int8_too(folders, tmp_path):
    checkpoint = Checkpoint(folders["all"])
    stored = {}
    for name in checkpoint.block.expected_tensors():
        stored[name], stored[name + SCALE] = checkpoint.weight(name)
    write_factor_file(tmp_path / "factors.safetensors", checkpoint.block, stored)
    state = {name.removeprefix("model."): t for name, t in Checkpoint(folders["dense"]).tensors()}
    overlay_factors(state, str(tmp_path / "factors.safetensors"), read_config(folders["dense"]))
    lay_out_state(state, checkpoint.block, [{"torch"}] * SHAPE.num_layers, 1, torch.bfloat16, "test")
    expected = laid_out(folders["all"], {"torch"})
    assert {n for n in state if ".mlp." in n} == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


NAME = "model.layers.0.mlp.up_proj.u.weight"


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda t: t.pop(NAME + SCALE), CheckpointError, "expected a tensor .*_scale .*found none"),
        (lambda t: t.update({NAME + SCALE: torch.ones(20)}), CheckpointError, "expected shape"),
        (lambda t: t[NAME + SCALE].fill_(float("nan")), NonFiniteError, "finite scales of at least 0"),
        (lambda t: t[NAME + SCALE][3:4].neg_(), NonFiniteError, "finite scales of at least 0"),
        (lambda t: t[NAME].fill_(-128), CheckpointError, "expected values from -127 to 127, found -128"),
    ],
    ids=["no scale", "length", "nan", "negative", "-128"],
)
def test_damaged_int8_is_refused_as_it_is_read(folders, tmp_path, edit, error, words):
    shutil.copytree(folders["all"], tmp_path / "damaged")
    edit_shard(tmp_path / "damaged", edit)
    with pytest.raises(error, match=words):
        read_factored(str(tmp_path / "damaged"))


def test_a_scale_that_nxdi_does_not_get_is_refused(folders):
    short = NAME.removeprefix("model.") + SCALE
    with pytest.raises(CheckpointError, match=f"expected a tensor {NAME}{SCALE}"):
        laid_out(folders["all"], {"kernel"}, change=lambda state: state.pop(short))


UNEVEN = in_int8(mix_layer(("compact", "uv", "compact")))  # 11 pivots of down
PART = in_int8(mix_layer(("compact", "uv", "compact"), ranks=EVEN), ("gate_proj", "down_proj"))


@pytest.mark.parametrize(
    ("layer", "tp", "words"),
    [
        (UNEVEN, 2, "2 ranks share the 11 pivots of down_proj unevenly"),
        (PART, 1, "up_proj in floating point beside, and a launch reads one kind of weights"),
    ],
    ids=["uneven", "mixed"],
)
def test_what_must_be_expanded_is_said_and_refused_where_kernels_are_required(layer, tp, words):
    readings = {"kernel": kernel_reading(layer, tp), "torch": torch_reading(layer, tp, torch.bfloat16)}
    assert words in readings["kernel"].why
    for decision in decide(Options(), None, None, 4, readings).values():
        assert decision.path == "kernel" and decision.weights == EXPANDED
        assert decision.reason.startswith("planned; int8 expanded: ") and words in decision.reason
    with pytest.raises(UsageError, match=rf"layer 4: expected int8 .*found .*{words}.*; use kernels: auto"):
        decide(Options(kernels="require"), None, None, 4, readings)
    assert decide(Options(kernels="require"), None, None, 4)  # floating point has nothing to expand


@pytest.mark.parametrize("layer", [UNEVEN, PART], ids=["uneven", "mixed"])
def test_kernels_of_expanded_weights_give_the_same_answer(layer):
    tensors = stored_tensors(layer, random_modules(layer))
    x = torch.randn(2, 3, layer.hidden_size)
    ran = run_kernels(layer, tensors, 2, x)
    for y in ran.outputs:
        close(y, mlp(layer, tensors, x), 1e-4)
    assert not any(
        isinstance(a, torch.Tensor) and a.dtype is torch.int8 for args in ran.arguments for a in args
    )


def test_log_and_metrics_name_the_weights():
    record = DispatchRecord()
    layer = in_int8(mix_layer(("dense", "uv", "compact")))
    readings = {"kernel": kernel_reading(layer, 1), "torch": torch_reading(layer, 1, torch.bfloat16)}
    decisions = decide(Options(kernels="prefill"), None, None, 0, readings)
    record.add(0, "prefill", 128, decisions["prefill"])
    record.add(0, "decode", 1, decisions["decode"])
    record.add(1, "decode", 1, Decision("torch", "kernels: prefill"))
    assert record.summary() == (
        "neuronmlp: decode: 1 layers by torch (kernels: prefill); decode: 1 layers by torch, int8 (kernels: "
        "prefill); prefill: 1 layers by kernel, int8 (planned)"
    )
    assert record.totals()["layers"] == [
        ["decode", "torch", "kernels: prefill", FLOATING, 1],
        ["decode", "torch", "kernels: prefill", INT8, 1],
        ["prefill", "kernel", "planned", INT8, 1],
    ]


def config_of(folder, **neuron):
    base = low_rank_config(InferenceConfig)
    values = {**read_config(folder), "_name_or_path": str(folder)}
    return base(base.get_neuron_config_cls()(**neuron), load_config=load_values(values))


def test_the_compile_key_tells_int8_from_floating_point(folders):
    keys = {name: config_of(folders[name]).neuronmlp["block"]["layers"] for name in ("part", "all", "float")}
    assert keys["part"] != keys["all"] != keys["float"] != keys["part"]
    assert keys["all"][0]["gate_proj"]["dtype"] == INT8


def test_the_int8_of_nxdi_itself_is_refused_with_what_to_do(folders):
    with pytest.raises(UsageError, match=r"expected quantized=False.*leave it off.*stays int8 without it"):
        config_of(folders["all"], quantized=True)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_vendor_is_asked_with_the_arguments_of_an_int8_launch(tp, monkeypatch):
    asked = []
    monkeypatch.setattr(trial, "trace", lambda kernel, *arguments: asked.append((kernel.__name__, arguments)))
    layer = in_int8(mix_layer(("compact", "uv", "compact"), ranks=EVEN))
    assert trial.refusal(layer, tp, torch.bfloat16, 4) is None
    assert [name for name, _ in asked] == (
        ["svd_mlp"] if tp == 1 else ["first_factors", "second_factors", "xuv"]
    )
    for _, arguments in asked:
        kinds = [a.dtype for a in arguments if isinstance(a, torch.Tensor)]
        assert kinds == [torch.bfloat16, torch.int8, torch.float32]


def test_a_shape_is_planned_for_int8():
    """The layouts that are declined or planned are those that are launched."""
    layer = MLPLayer.of(
        MLPShape(2048, 8192, 1), dict.fromkeys(PROJECTIONS, ProjectionSpec("compact", 1408, INT8))
    )
    assert declined(layer, 1, torch.bfloat16) is None
    assert all(layout.is_int8 for layout in stage_layouts(layer, 4).values())
