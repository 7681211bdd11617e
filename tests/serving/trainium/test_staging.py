"""What serving stages for tensor parallelism is what the cost model prices: one rule, no drift."""

import pytest

from neuronmlp_plugin.models.factors import MLPLayer, ProjectionSpec
from neuronmlp_plugin.serving.trainium.kernel_path import stage_layouts
from nki_kernels.cost.mlp_forms import gather
from nki_kernels.cost.models import ModelShape, rank_at
from nki_kernels.request import even_pivots, gathered_projection

SHAPE = ModelShape("small", 512, 1536, 2, 8, 2, 64, 1000)


def test_odd_pivots_are_dealt_evenly():
    """R = 417 on two cores: 209 slots, 208 pivots each; the odd pivot counts as another channel."""
    assert even_pivots(417, 2) == 208
    assert gathered_projection("compact", 417, 2).slots == 209
    assert gathered_projection("compact", 417, 2).pivots == 208


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("form", ["uv", "compact"])
def test_the_launches_that_serving_compiles_are_those_that_are_priced(form, tp):
    rank = rank_at(SHAPE.hidden, SHAPE.intermediate, form, 0.2)
    specs = {name: ProjectionSpec(form, rank) for name in ("gate_proj", "up_proj", "down_proj")}
    served = stage_layouts(MLPLayer(SHAPE.hidden, SHAPE.intermediate, **specs), tp)
    ((_, core),) = gather(SHAPE, tp, form, 0.2)
    assert [served[name] for name in ("first", "second", "last")] == list(core.launches)
