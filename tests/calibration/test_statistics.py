"""Streaming layer by layer gives what hooks on the whole model and autograd through all of it would give."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.statistics import (
    DAMPING,
    layer_metrics,
    layer_moments,
    loss_gradient,
    run_in_place,
)
from neuronmlp_plugin.calibration.workers import Workers
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import NonFiniteError, UsageError
from tests.tiny_models import FAMILIES, write_dense


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return write_dense(tmp_path, request.param)


def ids(count: int = 6, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(5))


def metrics(stream: LayerStream, windows: torch.Tensor) -> list:
    """Of all layers, in their order: forward with every input kept, and backward."""
    inputs = [stream.embed(windows)]
    for index in range(stream.num_layers):
        inputs.append(inputs[-1].clone())
        run_in_place(stream, stream.load(index), inputs[-1])
    gradient = loss_gradient(stream, inputs.pop(), windows)
    backward = reversed(range(stream.num_layers))
    return [layer_metrics(stream, stream.load(i), inputs[i], gradient, Workers()) for i in backward][::-1]


def test_moments_equal_those_of_the_whole_model(folder):
    windows, model = ids(), load_model(folder)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.register_forward_pre_hook(
            lambda _, args, i=index: seen.__setitem__(("gate_up", i), args[0])
        )
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=index: seen.__setitem__(("down", i), args[0])
        )
    with torch.no_grad():
        model(windows)
    stream = LayerStream(Checkpoint(folder))
    hidden = stream.embed(windows)
    for index in range(stream.num_layers):
        moments = layer_moments(stream, stream.load(index), hidden, lambda _: None, Workers())
        for name in ("gate_up", "down"):
            rows = seen[name, index].flatten(0, 1).double()
            torch.testing.assert_close(
                getattr(moments, name), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
            )
        stream.release(index)
    assert moments.num_tokens == windows.numel()


def test_metrics_equal_autograd_through_the_whole_model(folder):
    windows, model = ids(), load_model(folder)
    outputs = {}

    def keep(name, index):
        def hook(_module, _args, output):
            output.retain_grad()
            outputs[name, index] = output

        return hook

    for index, layer in enumerate(model.model.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).register_forward_hook(keep(name, index))
    logits = model(windows).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for index, found in enumerate(metrics(LayerStream(Checkpoint(folder)), windows)):
        for name in ("gate_proj", "up_proj"):
            grad = outputs[name, index].grad.flatten(0, 1).double()
            torch.testing.assert_close(getattr(found, name), grad.square().mean(0), rtol=1e-3, atol=1e-9)
        grad = outputs["down_proj", index].grad.flatten(0, 1).double()
        exact = grad.T @ grad / len(grad)
        exact += DAMPING * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)
        torch.testing.assert_close(found.down_proj, exact, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 0})],
    ids=str,
)
def test_windows_beyond_a_sliding_one_are_refused(tmp_path, family, changes):
    folder = write_dense(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 8, **changes}))
    stream = LayerStream(Checkpoint(folder))
    layer = stream.load(0)
    stream.run(layer, torch.randn(1, 8, 128))
    with pytest.raises(
        UsageError, match="--window: expected at most the model's sliding window, 8 tokens, found 9"
    ):
        stream.run(layer, torch.randn(1, 9, 128))


def test_activations_that_overflow_are_refused(tmp_path):
    stream = LayerStream(Checkpoint(write_dense(tmp_path, "llama")))
    layer = stream.load(0)
    layer.mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(NonFiniteError, match="finite"):
        layer_moments(stream, layer, stream.embed(ids()), lambda _: None, Workers())
