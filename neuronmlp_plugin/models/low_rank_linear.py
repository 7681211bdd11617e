"""The torch module that stands in for a projection's `nn.Linear`; the definition of what each form computes."""

from __future__ import annotations

import torch
from torch import nn

from neuronmlp_plugin.models.projection import MLPShape, ProjectionSpec, tensor_shapes


def _linear(size: tuple[int, int]) -> nn.Linear:
    out_features, in_features = size
    return nn.Linear(in_features, out_features, bias=False)


class UVLinear(nn.Module):
    """`uv`: y = (x u^T) v^T, x `[..., in]`, y `[..., out]`; parameters `u.weight [R, in]`, `v.weight [out,
    R]`.
    """

    def __init__(self, u: tuple[int, int], v: tuple[int, int]) -> None:
        super().__init__()
        self.u, self.v = _linear(u), _linear(v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(self.u(x))


class OutputPivotedLinear(nn.Module):
    """`compact`, gate and up: z = x u^T, y = [z, z c^T]; parameters `u.weight [R, in]`, `c.weight [out - R,
    R]`.
    """

    def __init__(self, u: tuple[int, int], c: tuple[int, int]) -> None:
        super().__init__()
        self.u, self.c = _linear(u), _linear(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.u(x)
        return torch.cat((z, self.c(z)), dim=-1)


class InputPivotedLinear(nn.Module):
    """`compact`, down: z = x[:R] + x[R:] c^T, y = z v^T; parameters `c.weight [R, in - R]`, `v.weight [out,
    R]`.
    """

    def __init__(self, c: tuple[int, int], v: tuple[int, int]) -> None:
        super().__init__()
        self.c, self.v = _linear(c), _linear(v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rank = self.v.in_features
        return self.v(x[..., :rank] + self.c(x[..., rank:]))


def build_linear(projection: str, spec: ProjectionSpec, shape: MLPShape) -> nn.Module:
    """An uninitialised module whose `state_dict` keys are exactly the tensor suffixes of FORMAT.md."""
    sizes = {
        suffix.removesuffix(".weight"): size
        for suffix, size in tensor_shapes(projection, spec, shape).items()
    }
    if spec.form == "dense":
        return _linear(sizes["weight"])
    if spec.form == "uv":
        return UVLinear(**sizes)
    return InputPivotedLinear(**sizes) if projection == "down_proj" else OutputPivotedLinear(**sizes)
