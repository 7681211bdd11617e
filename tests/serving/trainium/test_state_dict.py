"""What NxDI is given instead of the checkpoint's tensors, and what is refused because NxDI would fill it with
random numbers.
"""

from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.serving.trainium.state_dict import lay_out_state, read_factored
from tests.tiny_models import MIXED_LAYERS, SHAPE, write_dense, write_mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")
    return write_mixed(root / "mixed", write_dense(root / "dense", "llama"))


def laid_out(folder, tp=8, path="torch", change=lambda state: None):
    state, block = read_factored(str(folder)), Checkpoint(folder).block
    change(state)
    lay_out_state(state, block, [{path}] * SHAPE.num_layers, tp, torch.float32, str(folder))
    return state


def test_eight_ranks_get_equal_slices_and_zeros_behind_the_last_rank(folder):
    state = laid_out(folder)
    u = state[
        "layers.0.mlp.torch_path.gate_proj.first.weight"
    ]  # compact, rank 37: 5 slots a rank, 3 of 8 ranks one short
    assert u.shape == (40, SHAPE.hidden_size)
    assert [bool(u[rank * 5 + 4].any()) for rank in range(8)] == [True] * 5 + [False] * 3
    second = state["layers.0.mlp.torch_path.gate_proj.second.weight"]
    assert second.shape == (SHAPE.intermediate_size - 8 * 4, 40)
    assert not second[:, [rank * 5 + 4 for rank in (5, 6, 7)]].any()
    assert state["layers.0.mlp.torch_path.down_proj.second.weight"].shape == (
        SHAPE.hidden_size,
        SHAPE.intermediate_size,
    )


def test_nothing_of_the_checkpoint_layout_is_left_and_the_rest_is_untouched(folder):
    before, after = read_factored(str(folder)), laid_out(folder)
    ours = [name for name in after if ".mlp." in name]
    assert ours and all(".mlp.torch_path." in name for name in ours)
    assert {n for n in before if ".mlp." not in n} == {n for n in after if ".mlp." not in n}


def test_packed_weights_come_with_the_rank_as_data(folder):
    state = laid_out(folder, tp=2, path="kernel")
    assert state["layers.1.mlp.kernel_path.rank.rank"].tolist() == [0, 1]
    packed = {name: tensor for name, tensor in state.items() if name.endswith("second.weight")}
    assert len(packed) == SHAPE.num_layers and all(tensor.shape[0] == 2 * 128 for tensor in packed.values())


NAME = "layers.1.mlp.down_proj.c.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NAME), f"expected a tensor model.{NAME}"),
        (lambda state: state.update({NAME: state[NAME][:-1]}), "expected shape"),
        (
            lambda state: state.update({"layers.1.mlp.down_proj.u.weight": torch.zeros(1, 1)}),
            "expected no tensor",
        ),
    ],
)
def test_a_factor_that_is_missing_misshapen_or_extra_is_refused(folder, change, message):
    with pytest.raises(CheckpointError, match=message):
        laid_out(folder, change=change)


def test_every_tensor_of_the_format_is_asked_for(folder):
    """Withhold each in turn: none may pass unnoticed."""
    names = [n.removeprefix("model.") for n in Checkpoint(folder).block.expected_tensors()]
    assert len(names) == sum(
        1 if spec.form == "dense" else 2 for layer in MIXED_LAYERS for spec in layer.values()
    )
    for name in names:
        with pytest.raises(CheckpointError, match="expected a tensor"):
            laid_out(folder, change=lambda state, name=name: state.pop(name))
