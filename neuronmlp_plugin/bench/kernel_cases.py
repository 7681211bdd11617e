"""The cases of `neuronmlp bench kernels` and what each is compared with. All times simulated, all on one
core, bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from neuronmlp_plugin.errors import UsageError
from nki_kernels.cost import baselines
from nki_kernels.cost.baselines import BF16, aws_matmul, aws_twice, paper_fused
from nki_kernels.cost.calibration import CHAIN
from nki_kernels.cost.constants import Constants
from nki_kernels.cost.estimate import Estimate
from nki_kernels.cost.launches import Priced, price_launch
from nki_kernels.cost.models import MODELS, ModelShape, rank_at
from nki_kernels.cost.search import dma_bound_us, tensor_bound_us
from nki_kernels.layout import DENSE, Layout, Projection, chain_layout, gated_layout, mlp_layout
from nki_kernels.planner import Request
from nki_kernels.targets import Target

CHAIN_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MLP_MODELS = ("Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-4B")
PREFILL_TOKENS = (512, 2048, 8192)
DECODE_TOKENS = (1, 4, 16, 64)
REMOVED_RATIO = 0.20


@dataclasses.dataclass(frozen=True)
class Result:
    """One case. `tensor_bound_us`: useful FLOPs at the rate of TensorE's widest matmuls; `traffic_bound_us`:
    the traffic of `best` at the DMA rate of its rows.

    `others`: simulated_us by name of what it is compared with.
    """

    case: str
    tokens: int
    best: Priced
    tensor_bound_us: float
    traffic_bound_us: float
    others: dict[str, float]

    @property
    def simulated_us(self) -> float:
        return self.best.estimate.simulated_us

    @property
    def over_bound(self) -> float:
        """Latency over the larger of the two bounds."""
        return self.simulated_us / max(self.tensor_bound_us, self.traffic_bound_us)

    @property
    def winner(self) -> str:
        """What to run: ours where nothing else of ours is faster."""
        ours = {name: us for name, us in self.others.items() if name in ("unfused", "dense")}
        return min({"fused": self.simulated_us, **ours}.items(), key=lambda item: item[1])[0]


def _priced(request: Request, target: Target, constants: Constants) -> Priced:
    try:
        return price_launch(request, target, constants)
    except ValueError as error:
        raise UsageError(f"bench kernels: {error}") from error


def _result(
    case: str, request: Request, target: Target, constants: Constants, others: dict[str, float]
) -> Result:
    best = _priced(request, target, constants)
    work = tensor_bound_us(request.layout, request.tokens, target)
    return Result(case, request.tokens, best, work, dma_bound_us(best.plan, target, constants), others)


def _in_turn(requests: list[Request], target: Target, constants: Constants) -> float:
    """Launches one after the other, what passes between them in HBM."""
    return sum(
        (_priced(request, target, constants).estimate for request in requests), Estimate()
    ).simulated_us


def published_us(tokens: int, target: Target, constants: Constants) -> dict[str, float]:
    """The chain by the published algorithms."""
    k, r, n = CHAIN
    found = {
        "AWS dense": aws_matmul(tokens, k, n, target, constants).simulated_us,
        "AWS twice": aws_twice(tokens, k, r, n, target, constants).simulated_us,
    }
    if tokens % baselines.BLOCK == 0:
        found["paper"] = paper_fused(tokens, k, r, n, target, constants).simulated_us
    return found


def chain_request(tokens: int) -> Request:
    """The chain as ours, x^T given as to the published kernels."""
    k, r, n = CHAIN
    return Request(chain_layout(k, n, Projection.whole("uv", r)), tokens, BF16, transposed_input=True)


def chain_case(tokens: int, target: Target, constants: Constants) -> Result:
    """x U V of the paper: ours, in two launches, from x as it is, and the published algorithms."""
    k, r, n = CHAIN
    request = chain_request(tokens)
    natural = dataclasses.replace(request, transposed_input=False)
    first = chain_layout(k, r, DENSE, transposed_output=True)
    halves = [
        Request(layout, tokens, BF16, transposed_input=True) for layout in (first, chain_layout(r, n, DENSE))
    ]
    others = {
        "unfused": _in_turn(halves, target, constants),
        "x not transposed": _priced(natural, target, constants).estimate.simulated_us,
        **published_us(tokens, target, constants),
    }
    return _result("chain", request, target, constants, others)


def _layouts(shape: ModelShape, form: str) -> tuple[Layout, list[tuple[Layout, bool]]]:
    """The MLP in one launch, and its two halves with whether they take their input transposed."""
    projection = (
        DENSE
        if form == "dense"
        else Projection.whole(form, rank_at(shape.hidden, shape.intermediate, form, REMOVED_RATIO))
    )
    sizes = shape.hidden, shape.intermediate
    halves = [
        (gated_layout(*sizes, projection, projection), False),
        (chain_layout(sizes[1], sizes[0], projection), True),
    ]
    return mlp_layout(*sizes, projection, projection, projection), halves


def mlp_case(name: str, tokens: int, target: Target, constants: Constants) -> Result:
    """A model's gated MLP at removed_ratio 0.20, form uv: in one launch, in two, and dense."""
    whole, halves = _layouts(MODELS[name], "uv")
    dense, dense_halves = _layouts(MODELS[name], "dense")
    apart = [
        [Request(layout, tokens, BF16, transposed_input=t) for layout, t in pair]
        for pair in (halves, dense_halves)
    ]
    dense_us = _priced(Request(dense, tokens, BF16), target, constants).estimate.simulated_us
    others = {
        "unfused": _in_turn(apart[0], target, constants),
        "dense": min(dense_us, _in_turn(apart[1], target, constants)),
    }
    return _result(name, Request(whole, tokens, BF16), target, constants, others)


def cases(kind: str, target: Target, constants: Constants) -> Iterator[Result]:
    """All cases of "chain", "prefill" or "decode", one by one."""
    if kind == "chain":
        yield from (chain_case(tokens, target, constants) for tokens in CHAIN_TOKENS)
        return
    for name in MLP_MODELS:
        for tokens in PREFILL_TOKENS if kind == "prefill" else DECODE_TOKENS:
            yield mlp_case(name, tokens, target, constants)
