"""What may move, and that nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuronmlp_plugin.models.definition import build_linear, dequantize, quantize
from neuronmlp_plugin.models.factors import MLPLayer, MLPShape, ProjectionSpec
from neuronmlp_plugin.refinement.descent import mlp_linears, trainable

SHAPE = MLPShape(12, 20, 1)


def mlp() -> nn.ModuleDict:
    torch.manual_seed(0)
    specs = {
        "gate_proj": ProjectionSpec("uv", 4),
        "up_proj": ProjectionSpec("dense"),
        "down_proj": ProjectionSpec("compact", 5),
    }
    return nn.ModuleDict({name: build_linear(m) for name, m in MLPLayer.of(SHAPE, specs).matrices.items()})


def step(module: nn.ModuleDict, parameters: list[nn.Parameter]) -> None:
    x = torch.randn(7, 12)
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    module["down_proj"](module["gate_proj"](x) * module["up_proj"](x)).square().sum().backward()
    optimiser.step()


def test_the_chosen_weights_move_and_nothing_else():
    module = mlp()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    linears = mlp_linears(module)
    assert set(linears) == {"gate_proj.u", "gate_proj.v", "up_proj", "down_proj.c", "down_proj.v"}
    with trainable(module, [linears["gate_proj.v"], linears["up_proj"]], 0) as parameters:
        step(module, parameters)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"gate_proj.v.weight", "up_proj.weight"}
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("adapter_rank", [0, 2])
def test_through_int8_the_numbers_that_are_seen_are_rounded_and_those_behind_them_move(adapter_rank):
    module = mlp()
    linears = mlp_linears(module)
    start = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    with trainable(module, linears.values(), adapter_rank, is_int8=True) as parameters:
        for name, linear in linears.items():
            assert torch.equal(linear.weight, dequantize(*quantize(start[name])))
        step(module, parameters)
        moved = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for name, linear in linears.items():
        assert not torch.equal(linear.weight, dequantize(*quantize(start[name])))
        torch.testing.assert_close(linear.weight, moved[name], rtol=0, atol=0)
        torch.testing.assert_close(dequantize(*quantize(linear.weight)), linear.weight, rtol=1e-6, atol=1e-8)


def test_adapters_begin_as_nothing_change_at_most_their_rank_and_are_merged():
    module = mlp()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(3, 12)
    plain = module["gate_proj"](x)
    factors = [linear for name, linear in mlp_linears(module).items() if name != "up_proj"]
    with trainable(module, factors, 2) as parameters:
        torch.testing.assert_close(module["gate_proj"](x), plain)
        assert sum(parameter.numel() for parameter in parameters) == 2 * (12 + 4 + 4 + 20 + 15 + 5 + 5 + 12)
        step(module, parameters)
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
        name: t.shape for name, t in before.items()
    }
    torch.testing.assert_close(module["up_proj"].weight, before["up_proj.weight"])
    move = module["gate_proj"].v.weight - before["gate_proj.v.weight"]
    assert 0 < int(torch.linalg.matrix_rank(move, rtol=1e-4)) <= 2
