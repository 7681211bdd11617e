"""Deliberate mistakes are caught, by a refusal of the simulator or by the result. `-s` shows the list and the
catch rate.
"""

import collections
import contextlib
import functools
import pathlib
import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, MAX_ERROR, MLPCase, error, quantised, random_array, random_weights
from nki_kernels.kernels.sharded import first_factors, last_factor, second_factors
from nki_kernels.kernels.svd_mlp import xuv
from nki_kernels.layout import chain_layout, first_stage, int8_layout, last_stage, mlp_layout, second_stage
from nki_kernels.packing import factors_by_name, pack, pack_scales
from nki_kernels.planner import Choice, Request, build_plan
from nki_kernels.reference import silu
from nki_kernels.request import stage_request, z_is_natural
from nki_kernels.simulator.trace import Event, Instruction
from tests.nki_kernels.harness import EPS, run_svd_mlp, scales_by_name, without_scales
from tests.nki_kernels.mutants import EQUIVALENT, MODULES, Mutant, by_hand, by_rule, in_place, source_of
from tests.nki_kernels.test_planner import Peak

# Room for each mistake to show: ragged token blocks and edges, several tiles of everything, a ring that
# wraps, two token groups, two
# moving tiles, staged rows both short and whole, whole pivot tiles. Small, since every mutant runs them.
SMALL = (
    (
        MLPCase(300, 700, 392, ("uv", "compact", "compact"), (70, 150, 290), "fp32", True, True),
        Choice(256, 2, 512, 512, 1),
    ),
    (MLPCase(5, 300, 420, ("dense", "compact", "uv"), (0, 290, 150), "bf16"), Choice(5, 9, 1024)),
    (MLPCase(3, 129, 140, ("uv", "dense", "compact"), (40, 0, 50), "fp32"), Choice(3, 1, 512)),
    (MLPCase(530, 600, 140, ("uv", "uv", "dense"), (70, 20, 0), "fp32", True), Choice(520, 2, 512, 0, 3)),
    (
        MLPCase(140, 1100, 800, ("compact", "compact", "uv"), (150, 140, 170), "fp32", groups=2),
        Choice(140, 2, 1024, 0, 1),
    ),
)


ROOM_BYTES = 2 << 30  # a judge takes some 50 MiB
TOKENS = 530
# Tokens (few: z crosses as [T, channels]), form of gate and of up, H, rank of down, cores, and the slots of
# gate and up on each core.
SHARDS = (
    (TOKENS, "uv", "uv", 160, 140, 2, 70, 90),
    (TOKENS, "dense", "uv", 100, 90, 1, 0, 1),
    (TOKENS, "uv", "dense", 100, 90, 1, 1, 0),
    (200, "uv", "uv", 160, 1060, 2, 70, 90),  # shares of more than 512, that begin inside a tile
)


class Work:
    """Counts what a run does: FLOPs, bytes moved, elements that each engine writes, the most SBUF alive at
    once.
    """

    def __init__(self) -> None:
        self.flops, self.moved_bytes, self.peak = 0, 0, Peak()
        self.elements: dict[str, int] = collections.Counter()

    def __call__(self, event: Event) -> None:
        self.peak(event)
        if isinstance(event, Instruction):
            self.flops += event.flops
            self.moved_bytes += event.transfer_bytes
            self.elements[event.engine] += event.writes[0].elements

    def totals(self) -> tuple[object, ...]:
        return self.flops, self.moved_bytes, self.peak.sbuf_bytes, dict(self.elements)


def run_int8(tokens: int, slots: int, group: int, spreads_pieces: bool, work: Work) -> float:
    """Error of svd_mlp with int8 weights in a ring of `slots`, over what the format allows."""
    case = MLPCase(tokens, 600, 400, ("uv", "compact", "compact"), (70, 140, 257), "fp32", True, True)
    layout = int8_layout(mlp_layout(case.hidden, case.intermediate, *case.projections))
    request = Request(layout, case.tokens, DTYPES["fp32"], EPS, True)
    plan = build_plan(
        request, Choice(tokens, slots, 512, 512, group, spreads_pieces=spreads_pieces, shares_rows=True)
    )
    assert plan.spreads_pieces == spreads_pieces
    found, expected = run_svd_mlp(case, plan, quantised(random_weights(case)), listeners=[work])
    return error(found, expected) / MAX_ERROR["fp32"]


def run_int8_alone(work: Work) -> float:
    """Error of one dense int8 projection with natural output and SiLU, over what the format allows."""
    case = MLPCase(20, 700, 160, ("dense",) * 3, (0, 0, 0), "fp32")
    weights = quantised({"down_proj": random_weights(case)["down_proj"]})
    layout = int8_layout(chain_layout(160, 700, case.projections[2]))
    x = random_array(np.random.default_rng(11), (20, 160), DTYPES["fp32"])
    packed = pack(layout, factors_by_name(without_scales(weights)))
    scales = pack_scales(layout, scales_by_name(weights))
    plan = build_plan(Request(layout, 20, DTYPES["fp32"], silu=True), Choice(20, 3, 512))
    found = simulate(xuv, listeners=[work])(x, packed, plan, None, scales)
    return error(found, reference.xuv(x, weights["down_proj"], activate=True)) / MAX_ERROR["fp32"]


def run_whole(case: MLPCase, choice: Choice, work: Work) -> float:
    """Error of svd_mlp, over what the format allows."""
    layout = mlp_layout(case.hidden, case.intermediate, *case.projections)
    plan = build_plan(
        Request(layout, case.tokens, DTYPES[case.dtype], EPS if case.norm else None, case.residual), choice
    )
    found, expected = run_svd_mlp(case, plan, random_weights(case), listeners=[work])
    return error(found, expected) / MAX_ERROR[case.dtype]


@functools.lru_cache
def sharded_case(
    tokens: int, gate_form: str, up_form: str, hidden: int, rank: int, cores: int, *slots: int
) -> tuple:
    """(case, launches of the three stages as (plan, packed weights), x, gathered z^T of all cores, expected
    y).
    """
    ranks = (cores * slots[0], cores * slots[1], rank)
    # In bf16 up to 255 tokens cross naturally, which is more than one tile of them.
    case = MLPCase(tokens, hidden, 300, (gate_form, up_form, "uv"), ranks, "bf16" if tokens < 256 else "fp32")
    dtype = DTYPES[case.dtype]
    whole, factors = (
        mlp_layout(case.hidden, case.intermediate, *case.projections),
        factors_by_name(random_weights(case)),
    )
    launches = []
    for stage in (first_stage(whole), second_stage(whole), last_stage(whole)):
        request = stage_request(stage, tokens, dtype)
        packed = pack(
            stage, {name: tensor for name, tensor in factors.items() if stage.matrix(name) is not None}
        )
        launches.append((build_plan(request, Choice(140 if tokens < 256 else 520, 2, 512)), packed))
    rng = np.random.default_rng(8)
    x = random_array(rng, (tokens, case.hidden), dtype)
    shares = [random_array(rng, (cores, size, tokens), dtype) for size in slots]
    gathered = [np.concatenate([share[core] for share in shares]) for core in range(cores)]
    z = np.concatenate([part.T if z_is_natural(tokens, dtype) else part for part in gathered])
    gate, up = (x if share.size == 0 else share.reshape(-1, tokens).T for share in shares)
    h = silu(reference.matmul(gate, factors["gate_second"])) * reference.matmul(up, factors["up_second"])
    h = h.astype(dtype)
    return case, launches, x, z, reference.down(h, random_weights(case)["down_proj"])


def run_pieces(shards: tuple, work: Work) -> float:
    """Error of first_factors, and of second_factors and last_factor in a row, over what fp32 allows."""
    case, ((first, packed_1), (second, packed_2), (last, packed_3)), x, z, expected = sharded_case(*shards)
    own = simulate(first_factors, listeners=[work])(x, packed_1, first)
    weights = random_weights(case)
    firsts = [weights[name]["u.weight"] for name in ("gate_proj", "up_proj") if "u.weight" in weights[name]]
    own = own if first.natural_z else own.T
    off = error(own, np.concatenate([reference.matmul(x, first) for first in firsts], axis=1))
    zd = simulate(second_factors, listeners=[work])(
        x if second.hidden else None, z, (*shards[6:], shards[4] // shards[5]), packed_2, second
    )
    if second.natural_z:  # the shares of all cores, one after another
        zd = np.concatenate(np.split(zd, shards[5]), axis=1)
    y = simulate(last_factor, listeners=[work])(zd, packed_3, last)
    return (off + error(y, expected)) / MAX_ERROR[case.dtype]


@functools.lru_cache
def transposed_chain() -> tuple:
    """(plan, packed weights, x, expected) of a dense projection with transposed output: it reads h while it
    stages results.
    """
    case = MLPCase(TOKENS, 300, 160, ("uv", "uv", "dense"), (140, 140, 0), "fp32")
    weights = random_weights(case)
    layout = chain_layout(160, 300, case.projections[2], transposed_output=True)
    x = random_array(np.random.default_rng(9), (TOKENS, 160), DTYPES["fp32"])
    packed = pack(layout, factors_by_name({"down_proj": weights["down_proj"]}))
    plan = build_plan(Request(layout, TOKENS, DTYPES["fp32"], silu=True), Choice(520, 2, 512))
    return plan, packed, x, reference.xuv(x, weights["down_proj"], activate=True)


def run_transposed(work: Work) -> float:
    """Error of xuv with transposed output and SiLU, over what fp32 allows."""
    plan, packed, x, expected = transposed_chain()
    return error(simulate(xuv, listeners=[work])(x, packed, plan).T, expected) / MAX_ERROR["fp32"]


@functools.lru_cache
def arriving_chain() -> tuple:
    """(plan, packed weights, x^T, expected) of a chain whose first product begins while x^T arrives."""
    case = MLPCase(TOKENS, 64, 1024, ("uv", "uv", "uv"), (20, 20, 300), "fp32")
    weights = {"down_proj": random_weights(case)["down_proj"]}
    layout = chain_layout(1024, 64, case.projections[2])
    x = random_array(np.random.default_rng(10), (TOKENS, 1024), DTYPES["fp32"])
    packed = pack(layout, factors_by_name(weights))
    plan = build_plan(
        Request(layout, TOKENS, DTYPES["fp32"], transposed_input=True), Choice(520, 3, 512, early_tiles=2)
    )
    assert plan.early_tiles == plan.early_group == 2
    return plan, packed, np.ascontiguousarray(x.T), reference.xuv(x, weights["down_proj"])


def run_arriving(work: Work) -> float:
    """Error of xuv from x^T that is multiplied as it comes, over what fp32 allows."""
    plan, packed, x, expected = arriving_chain()
    return error(simulate(xuv, listeners=[work])(x, packed, plan), expected) / MAX_ERROR["fp32"]


JUDGES = (
    *(functools.partial(run_whole, case, choice) for case, choice in SMALL),
    *(functools.partial(run_pieces, shards) for shards in SHARDS),
    run_transposed,
    run_arriving,
    functools.partial(run_int8, 140, 3, 1, False),
    functools.partial(run_int8, 300, 1, 4, True),
    run_int8_alone,
)


@functools.lru_cache
def work_of(judge: Callable[[Work], float]) -> tuple[object, ...]:
    """What the kernels as they are do."""
    work = Work()
    judge(work)
    return work.totals()


@contextlib.contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """Refuse (MemoryError) what takes so much more than the process has: one mistake asks for 24 GiB."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def catcher(mutant: Mutant) -> str | None:
    """What catches the mistake: a refusal, a wrong result, or other work than the kernel's; or None."""
    for judge in JUDGES:
        right, work = work_of(judge), Work()
        with in_place(mutant), at_most(ROOM_BYTES):
            try:
                off = judge(work)
            except (
                AssertionError,
                TypeError,
                IndexError,
                AttributeError,
                ValueError,
                ZeroDivisionError,
                MemoryError,
            ) as refusal:
                return f"{type(refusal).__name__}: {str(refusal)[:90]}"
        if not off <= 1:
            return f"error {off:.1e} times what the format allows"
        if work.totals() != right:
            return f"FLOPs, bytes, SBUF and elements {work.totals()} instead of {right}"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_the_kernels_as_they_are_are_not_caught(module):
    """What catches everything would catch them too."""
    assert catcher(Mutant(module, "unchanged", source_of(module))) is None


@pytest.mark.parametrize("mutant", list(by_hand()), ids=str)
def test_a_mistake_made_by_hand_is_caught(mutant):
    caught = catcher(mutant)
    print(f"{mutant}  <-  {caught}")
    assert caught is not None


@pytest.mark.large
@pytest.mark.parametrize("module", MODULES)
def test_mistakes_made_by_rule_are_caught(module):
    mutants = list(by_rule(module))
    missed = [mutant for mutant in mutants if catcher(mutant) is None]
    print(
        f"{module}: {len(mutants) - len(missed)} of {len(mutants)} caught; missed: "
        f"{[str(mutant) for mutant in missed]}"
    )
    assert {mutant.told for mutant in missed} <= EQUIVALENT.keys()
