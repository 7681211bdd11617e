"""The real compressed SmolLM2: every MLP form in its checkpoint, through the kernel, against the torch module
on real activations.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from nki_kernels.backend import simulate
from nki_kernels.cases import MAX_ERROR, error
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import Projection, layout_of
from nki_kernels.packing import factors_by_name, pack, pack_norm
from nki_kernels.planner import plan_mlp

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
TOKENS = 200
LAYERS = (0, 2, 15, 29)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def captured(request, smollm2, smollm2_compressed):
    """(model, layer -> (input of the norm in front of the MLP, output of the MLP)) on held-out text."""
    from transformers import AutoTokenizer

    from neuronmlp_plugin.checkpoint.loader import load_model

    model = load_model(smollm2_compressed, dtype=torch.bfloat16 if request.param == "bf16" else torch.float32)
    seen: dict[int, list] = {index: [] for index in LAYERS}
    for index in LAYERS:
        layer = model.model.layers[index]
        # A hook that returns something replaces what it was shown: append returns None.
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _module, args, i=index: seen[i].append(args[0][0])
        )
        layer.mlp.register_forward_hook(lambda _module, _args, out, i=index: seen[i].append(out[0]))
    text = json.loads((smollm2 / "heldout.jsonl").read_text().splitlines()[0])["text"]
    tokens = AutoTokenizer.from_pretrained(smollm2_compressed)(text, return_tensors="pt").input_ids[
        :, :TOKENS
    ]
    with torch.no_grad():
        model(tokens)
    return request.param, model, seen


def to_numpy(tensor):
    """bf16 keeps its bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def projection_of(module) -> tuple[Projection, dict]:
    """Form, rank and groups as the checkpoint's module has them, and its tensors."""
    tensors = {name: to_numpy(tensor) for name, tensor in module.state_dict().items()}
    if "weight" in tensors:
        return Projection.whole("dense"), tensors
    matrix = module.matrix
    return Projection.whole(matrix.spec.form, matrix.rank, matrix.groups), tensors


def channels_of(mlp) -> int:
    """How many intermediate channels a layer has kept."""
    down = mlp.down_proj
    return down.in_features if isinstance(down, torch.nn.Linear) else down.matrix.channels


@pytest.mark.parametrize("index", LAYERS)
def test_real_layers_run_through_the_kernel_and_match_torch(captured, index):
    dtype, model, seen = captured
    layer = model.model.layers[index]
    x, expected = (to_numpy(tensor) for tensor in seen[index])
    assert x.shape == (TOKENS, 576)
    forms, tensors = zip(*(projection_of(getattr(layer.mlp, name)) for name in PROJECTIONS), strict=True)
    norm = layer.post_attention_layernorm
    plan = plan_mlp(576, channels_of(layer.mlp), forms, TOKENS, x.dtype, norm.variance_epsilon)
    assert plan, plan
    packed = pack(
        layout_of(plan.products, plan.external_z),
        factors_by_name(dict(zip(PROJECTIONS, tensors, strict=True))),
    )
    found = simulate(svd_mlp)(np.ascontiguousarray(x), packed, plan, pack_norm(to_numpy(norm.weight.float())))
    off = error(found, expected)
    print(f"layer {index} {dtype} {[f.form for f in forms]}: {off:.1e}")
    assert off <= MAX_ERROR[dtype]


def test_the_checkpoint_has_low_rank_layers_to_show(captured):
    _, model, _ = captured
    forms = {
        projection_of(getattr(layer.mlp, name))[0].form
        for layer in model.model.layers
        for name in PROJECTIONS
    }
    assert forms - {"dense"}
