"""What docs/cost_model.md says of our kernels, under the calibrated constants: simulated, and deterministic,
so a bound is a bound. Nothing here is a clock.
"""

import statistics

import pytest

from neuronmlp_plugin.bench.int8_cases import MLP_FORMS, MLP_MODELS, mean_mlp
from neuronmlp_plugin.bench.kernel_cases import CHAIN_TOKENS, chain_request, published_us
from neuronmlp_plugin.bench.layer_cases import CORES, best_form, compare, steps_of
from nki_kernels.cost.baselines import BF16
from nki_kernels.cost.constants import CALIBRATED, SLOW_CASTS
from nki_kernels.cost.interconnect import COLLECTIVES, MESH, RING
from nki_kernels.cost.launches import price_launch
from nki_kernels.cost.mlp_forms import FORMS, dense, in_int8
from nki_kernels.cost.models import MODELS, rank_at
from nki_kernels.cost.search import dma_bound_us, tensor_bound_us
from nki_kernels.cost.tensor_parallel import Setting
from nki_kernels.layout import Projection, mlp_layout
from nki_kernels.request import stage_request
from nki_kernels.targets import TRN1

ALL = steps_of(2048, [1, 16])


def gains(model, tp, between=RING, steps=ALL):
    """Speed over dense, step by step, of the best form for a number of cores."""
    compared = compare(MODELS[model], 0.20, steps, Setting(TRN1, CALIBRATED, between, tp))
    form = best_form(compared)
    return [item.gain(form) for item in compared]


@pytest.mark.large
@pytest.mark.parametrize("between", COLLECTIVES.values(), ids=lambda c: c.name)
def test_no_model_loses_on_any_number_of_cores(between):
    for model in ("Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B", "Llama-3.1-70B"):
        for tp in CORES:
            if tp >= MODELS[model].least_tp:
                assert min(gains(model, tp, between)) > 1, (model, tp)


@pytest.mark.parametrize("between", [RING, MESH], ids=lambda c: c.name)
def test_8b_gains_a_tenth_on_eight_cores(between):
    assert min(gains("Llama-3.1-8B", 8, between)[:2]) >= 1.10  # TTFT and TPOT


def test_70b_gains_on_thirty_two_cores():
    assert min(gains("Llama-3.1-70B", 32)[:2]) >= 1.04


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("model", MLP_MODELS)
def test_int8_decode_of_an_mlp_over_dense_bf16(model, tokens):
    """Bound by DMA; slow casts would bound it instead, and leave it half as fast again as bf16."""
    shape = MODELS[model]
    base = mean_mlp(dense(shape, 1), tokens, CALIBRATED).simulated_us
    whole, low = (in_int8(blend) for blend in (dense(shape, 1), FORMS["groups compact"](shape, 1, 0.20)))
    assert base / mean_mlp(whole, tokens, CALIBRATED).simulated_us >= 1.9
    found = mean_mlp(low, tokens, CALIBRATED)
    assert base / found.simulated_us >= 2.25 and found.bound == "dma"
    slow = mean_mlp(low, tokens, SLOW_CASTS)
    assert 1.6 <= base / slow.simulated_us <= 1.9 and slow.bound in ("scalar", "vector")


@pytest.mark.parametrize("tokens", [4, 16])
def test_decode_is_bound_by_bandwidth(tokens):
    """The smallest model, where what begins and ends a launch weighs most."""
    shape = MODELS["Llama-3.2-1B"]
    rank = rank_at(shape.hidden, shape.intermediate, "uv", 0.20)
    part = Projection.whole("uv", rank)
    layout = mlp_layout(shape.hidden, shape.intermediate, part, part, part)
    found = price_launch(stage_request(layout, tokens, BF16))
    assert found.estimate.simulated_us <= 1.02 * dma_bound_us(found.plan)


@pytest.mark.large
@pytest.mark.parametrize("model", MLP_MODELS)
def test_an_int8_prefill_is_no_slower_than_the_bf16_kernel_of_its_form(model):
    shape = MODELS[model]
    for blend in (dense(shape, 1), *(FORMS[form](shape, 1, 0.20) for form in MLP_FORMS)):
        int8, bf16 = (mean_mlp(b, 2048, CALIBRATED).simulated_us for b in (in_int8(blend), blend))
        assert int8 <= 1.02 * bf16


@pytest.mark.large
def test_the_chain_against_the_published_kernels():
    """Ahead of all of them everywhere; closest at 1K tokens, where x^T in rows of 1 KiB arrives more slowly
    than it is multiplied.
    """
    over: dict[str, dict[int, float]] = {"AWS dense": {}, "AWS twice": {}, "paper": {}}
    for tokens in CHAIN_TOKENS:
        ours = price_launch(chain_request(tokens)).estimate.simulated_us
        assert tokens < 4096 or ours <= 1.01 * tensor_bound_us(chain_request(tokens).layout, tokens)
        for name, us in published_us(tokens, TRN1, CALIBRATED).items():
            over[name][tokens] = us / ours
    assert statistics.mean(over["AWS twice"][t] for t in (8192, 16384, 32768)) >= 1.45
    assert not {(name, t) for name, gain in over.items() for t, x in gain.items() if x < 1}
