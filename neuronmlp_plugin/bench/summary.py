"""Small tables that draw on several kinds of bench: goals against what is reached, how much hangs on
the DMA rates, how good the planner's rule is. Simulated throughout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from neuronmlp_plugin.bench.arguments import Write
from neuronmlp_plugin.bench.kernel_cases import Result, chain_request, published_us
from nki_kernels.cost.baselines import BF16
from nki_kernels.cost.constants import CALIBRATED, SETS
from nki_kernels.cost.launches import price_launch
from nki_kernels.cost.mlp_forms import FORMS, dense
from nki_kernels.cost.models import MODELS
from nki_kernels.cost.search import Found, search
from nki_kernels.request import Request, stage_request
from nki_kernels.targets import TRN1

COLUMNS = ("ours", "paper", "AWS twice", "AWS dense")
PLAN_MODELS, PLAN_TOKENS = ("Llama-3.2-1B", "Qwen3-4B"), (1, 512, 2048)


def _chain(results: list[Result], at_least: int, at_most: int) -> list[Result]:
    return [r for r in results if r.case == "chain" and at_least <= r.tokens <= at_most]


def _gains(results: list[Result], name: str) -> list[float]:
    """Latency of what a result is compared with over ours."""
    return [r.others[name] / r.simulated_us for r in results if name in r.others]


def against_what_was_asked(results: list[Result], write: Write) -> None:
    """What the kernels are asked to reach, and what they do."""
    head = ("", "goal", "reached (simulated, constants calibrated)")
    for what, asked, reached in (head, *_reached_by_chain(results), *_reached_by_mlps(results)):
        write(f"{what:<66}{asked:>9}  {reached}")


def _reached_by_chain(results: list[Result]) -> Iterator[tuple[str, str, str]]:
    """(what, asked, reached)"""
    over_bound = [r.simulated_us / r.tensor_bound_us for r in _chain(results, 4096, 32768)]
    yield "chain, T = 4K ... 32K, over the TensorE bound", "<= 1.06", _listed(over_bound)
    twice = _gains(_chain(results, 8192, 32768), "AWS twice")
    mean = f"{statistics.mean(twice):.2f} ({_listed(twice)})"
    yield "chain over AWS twice, mean of 8K ... 32K", ">= 1.45", mean
    dense = _gains(_chain(results, 32768, 32768), "AWS dense")
    yield "chain over AWS dense at 32K", ">= 2.4", _listed(dense)
    every = _chain(results, 128, 32768)
    for name in ("AWS twice", "paper"):
        slowest = min((r for r in every if name in r.others), key=lambda r: r.others[name] / r.simulated_us)
        gain = slowest.others[name] / slowest.simulated_us
        what = f"chain, T = 128 ... 32K, over {name}, the least"
        yield what, ">= 1.00", f"{gain:.3f} at T = {slowest.tokens}"


def _reached_by_mlps(results: list[Result]) -> Iterator[tuple[str, str, str]]:
    """(what, asked, reached)"""
    mlps = [r for r in results if r.case != "chain"]
    few, many = [r for r in mlps if r.tokens <= 64], [r for r in mlps if r.tokens > 64]
    most = max(r.over_bound for r in few)
    yield "MLP decode, over the bandwidth bound, the most", "<= 1.02", f"{most:.3f}"
    traffic = [r.best.estimate.counters.hbm_bytes / r.best.estimate.counters.hbm_unique_bytes for r in many]
    at_512 = max(x for x, r in zip(traffic, many, strict=True) if r.tokens == 512)
    what = "MLP prefill, traffic over compulsory, T = 512 / beyond"
    yield what, "<= 1.15", f"{at_512:.2f} / {max(traffic):.2f}"
    least = min(few, key=lambda r: r.others["dense"] / r.simulated_us)
    gain = least.others["dense"] / least.simulated_us
    what = "MLP decode at removed_ratio 0.20 over dense, the least"
    yield what, ">= 1.20", f"{gain:.2f} ({least.case}, T = {least.tokens})"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def by_rates(write: Write) -> None:
    """The chain at 8192 tokens under every set of DMA rates, in us."""
    write(f"{'chain, T = 8192, simulated_us':<32}{''.join(f'{name:>12}' for name in COLUMNS)}")
    for name, constants in SETS.items():
        ours = price_launch(chain_request(8192), TRN1, constants).estimate.simulated_us
        values = {"ours": ours, **published_us(8192, TRN1, constants)}
        write(f"{'constants ' + name:<32}{''.join(f'{values[column]:>12.0f}' for column in COLUMNS)}")


def _launches() -> Iterator[tuple[str, Request]]:
    for name in PLAN_MODELS:
        forms = {"dense": dense(MODELS[name], 1), "compact": FORMS["groups compact"](MODELS[name], 1, 0.20)}
        for form, blend in forms.items():
            for tokens in PLAN_TOKENS:
                yield f"{name} {form} T={tokens}", stage_request(blend[-1][1].launches[0], tokens, BF16)


def plans(write: Write) -> None:
    """The planner's plan against the best of those that a search schedules."""
    write(f"{'simulated_us, constants calibrated':<36}{'planner':>10}{'search':>10}{'planner/search':>16}")
    for name, request in _launches():
        found = search(request)
        assert isinstance(found, Found), name
        rule, best = (
            price_launch(request, TRN1, CALIBRATED).estimate.simulated_us,
            found.estimate.simulated_us,
        )
        write(f"{name:<36}{rule:>10.1f}{best:>10.1f}{rule / best:>16.3f}")
