"""Deliberate mistakes are caught, by a refusal of the simulator or by the result. `-s` shows the list and the catch rate."""

import functools

import pytest

from nki_kernels import backend
from nki_kernels.cases import DTYPES, MAX_ERROR, MLPCase, error, random_weights
from nki_kernels.layout import mlp_layout
from nki_kernels.plan import Plan
from nki_kernels.planner import Choice, Request, build_plan
from nki_kernels.simulator.trace import Instruction
from tests.nki_kernels.harness import EPS, run_svd_mlp
from tests.nki_kernels.mutants import EQUIVALENT, MODULES, Mutant, by_hand, by_rule, in_place, source_of

pytestmark = pytest.mark.skipif(backend.HAS_NKI, reason="mutants are judged by our own simulator")

# Room for each mistake to show: ragged token blocks and edges, several tiles of everything, a ring that wraps, two token groups, two
# moving tiles, staged rows both short and whole, whole pivot tiles. Small, since every mutant runs them.
SMALL = (
    (MLPCase(300, 600, 392, ("uv", "compact", "compact"), (70, 150, 290), "fp32", True, True), Choice(256, 2, 512, 512, 1)),
    (MLPCase(5, 300, 420, ("compact", "dense", "uv"), (290, 0, 150), "fp32"), Choice(5, 9, 1024)),
    (MLPCase(530, 600, 140, ("uv", "uv", "dense"), (70, 20, 0), "fp32", True), Choice(520, 2, 512, 0, 3)),
)


def plan_of(case: MLPCase, choice: Choice) -> Plan:
    layout = mlp_layout(case.hidden, case.intermediate, *case.projections)
    plan = build_plan(Request(layout, case.tokens, DTYPES["fp32"], EPS if case.norm else None, case.residual), choice)
    assert isinstance(plan, Plan), plan
    return plan


def run_counted(case: MLPCase, choice: Choice) -> tuple[float, tuple[int, int]]:
    """(error, (FLOPs, bytes moved)) of one run."""
    events = []
    found, expected = run_svd_mlp(case, plan_of(case, choice), random_weights(case), listeners=[events.append])
    records = [event for event in events if isinstance(event, Instruction)]
    return error(found, expected), (sum(r.flops for r in records), sum(r.transfer_bytes for r in records))


@functools.lru_cache
def work_of(case: MLPCase, choice: Choice) -> tuple[int, int]:
    """FLOPs and bytes of the kernel as it is."""
    return run_counted(case, choice)[1]


def catcher(mutant: Mutant) -> str | None:
    """What catches the mistake: a refusal, a wrong result, or other work than the kernel's; or None."""
    for case, choice in SMALL:
        work = work_of(case, choice)
        with in_place(mutant):
            try:
                off, found = run_counted(case, choice)
            except (AssertionError, TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError) as refusal:
                return f"{type(refusal).__name__}: {str(refusal)[:90]}"
        if not off <= MAX_ERROR["fp32"]:
            return f"result off by {off:.1e}"
        if found != work:
            return f"FLOPs and bytes {found} instead of {work}"
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


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_mistakes_made_by_rule_are_caught(module):
    mutants = list(by_rule(module))
    missed = [mutant for mutant in mutants if catcher(mutant) is None]
    print(f"{module}: {len(mutants) - len(missed)} of {len(mutants)} caught; missed: {[str(mutant) for mutant in missed]}")
    assert {mutant.told.split(": ", 1)[1] for mutant in missed} <= EQUIVALENT.keys()
