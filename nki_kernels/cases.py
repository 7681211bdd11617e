"""Shapes and inputs, once, for tests and benchmarks alike. A case names everything that it depends on and
prints as one line.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from nki_kernels.layout import FORMS, Projection
from nki_kernels.reference import SCALE

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
# Allowed scale-free error ||a - b|| / ||b|| against the reference, which rounds where the kernel does. It
# belongs to the format.
MAX_ERROR = {"bf16": 2e-2, "fp16": 2.5e-3, "fp32": 1e-5}
GRID_DTYPES = ("bf16", "fp32")
TOKENS = (1, 2, 7, 64, 127, 128, 129, 512, 1000)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXES = tuple((gate, up, down) for gate in FORMS for up in FORMS for down in FORMS)
# Model: hidden, intermediate, a rank at removed ratio 0.20 or so.
MODELS = {
    "SmolLM2-135M": (576, 1536, 320),
    "Llama-3.2-1B": (2048, 8192, 1280),
    "Qwen3-1.7B": (2048, 6144, 1152),
}
# Ragged in every dimension: below, across and just beyond tile edges.
SIZES = (
    (96, 200, (37, 53, 41)),
    (200, 392, (70, 133, 150)),
    (256, 640, (128, 129, 127)),
    (130, 257, (1, 128, 100)),
)

Weights = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class MLPCase:
    """One gated MLP: T tokens, H hidden, I intermediate, and form and rank of gate, up and down (ranks of
    dense ones are not used), the rank that of each of `groups` equal groups of channels.
    """

    tokens: int
    hidden: int
    intermediate: int
    forms: tuple[str, str, str]
    ranks: tuple[int, int, int]
    dtype: str = "bf16"
    norm: bool = False
    residual: bool = False
    groups: int = 1

    def __str__(self) -> str:
        shape = f"T{self.tokens}-H{self.hidden}-I{self.intermediate}"
        parts = "-".join(
            form if form == "dense" else f"{form}{rank}"
            for form, rank in zip(self.forms, self.ranks, strict=True)
        )
        groups = f"-g{self.groups}" * (self.groups > 1)
        return f"{shape}-{parts}{groups}-{self.dtype}" + "-norm" * self.norm + "-residual" * self.residual

    @property
    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Gate, up and down as a layout wants them."""
        gate, up, down = (
            Projection.whole(form, None if form == "dense" else rank, self.groups)
            for form, rank in zip(self.forms, self.ranks, strict=True)
        )
        return gate, up, down


def mlp_grid() -> Iterator[MLPCase]:
    """Every token count, every mix of forms, every ragged size, both formats: a covering sample, not the
    product.

    Each of the 27 mixes meets both dtypes and two token counts; sizes, RMSNorm and residual rotate through.
    """
    tokens = itertools.cycle(TOKENS)
    sizes = itertools.cycle(SIZES)
    for number, (forms, dtype, _) in enumerate(itertools.product(MIXES, GRID_DTYPES, range(2))):
        hidden, intermediate, ranks = next(sizes)
        yield MLPCase(
            next(tokens),
            hidden,
            intermediate,
            forms,
            ranks,
            dtype,
            norm=number % 3 == 0,
            residual=number % 4 < 2,
        )


def model_grid() -> Iterator[MLPCase]:
    """Shapes of real models, decode and prefill."""
    for (hidden, intermediate, rank), tokens in itertools.product(MODELS.values(), (1, 64, 512)):
        for forms in (("uv",) * 3, ("compact",) * 3, ("dense", "uv", "compact")):
            yield MLPCase(tokens, hidden, intermediate, forms, (rank, rank, rank), norm=True, residual=True)


def random_array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, scale: float = 1.0
) -> np.ndarray:
    """Normal numbers of standard deviation `scale`."""
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def random_projection(rng: np.random.Generator, name: str, case: MLPCase) -> dict[str, np.ndarray]:
    """Weights of one projection in FORMAT.md's tensors, scaled so that every product keeps the size of its
    input.
    """
    index = PROJECTIONS.index(name)
    form, rank = case.forms[index], case.ranks[index]
    n_in, n_out = (
        (case.intermediate, case.hidden) if name == "down_proj" else (case.hidden, case.intermediate)
    )
    stacked = case.groups * rank  # all groups' z
    if form == "dense":
        shapes = {"weight": (n_out, n_in)}
    elif name == "down_proj":
        first = (stacked, n_in // case.groups - (rank if form == "compact" else 0))
        shapes = {"c.weight" if form == "compact" else "u.weight": first, "v.weight": (n_out, stacked)}
    elif form == "uv":
        shapes = {"u.weight": (stacked, n_in), "v.weight": (n_out, rank)}
    else:
        shapes = {"u.weight": (stacked, n_in), "c.weight": (n_out - stacked, rank)}
    return {
        suffix: random_array(rng, shape, DTYPES[case.dtype], shape[1] ** -0.5)
        for suffix, shape in shapes.items()
    }


def random_weights(case: MLPCase, seed: int = 0) -> Weights:
    """Weights of all three projections."""
    rng = np.random.default_rng(seed)
    return {name: random_projection(rng, name, case) for name in PROJECTIONS}


def quantised(weights: Weights) -> Weights:
    """The same in int8 with a scale for every output channel, under FORMAT.md's names."""
    found: Weights = {}
    for name, tensors in weights.items():
        found[name] = {}
        for suffix, tensor in tensors.items():
            wide = tensor.astype(np.float32)
            scale = np.abs(wide).max(axis=1) / 127
            found[name][suffix] = np.rint(wide / scale[:, None]).astype(np.int8)
            found[name][suffix + SCALE] = scale.astype(np.float32)
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Scale-free difference ||found - expected|| / ||expected||; NaN where either is not finite."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
