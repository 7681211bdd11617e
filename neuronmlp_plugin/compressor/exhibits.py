"""What a report shows beside its measurements: the same few prompts, continued greedily by the dense and by
the compressed model; what other sizes would cost; the spectra.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from neuronmlp_plugin.calibration.aside import Aside, AsideError
from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.template import ChatTemplate
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import CalibrationError, UsageError
from neuronmlp_plugin.lowrank.allocate import CHOOSERS, Layer, loss
from neuronmlp_plugin.models.factors import PROJECTIONS

_QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "What is the capital of France, and what is it known for?",
    "Write the beginning of a story about a lighthouse keeper.",
    "List three uses of a paper clip.",
)
_BEGINNINGS = (
    "The sky is blue because",
    "The capital of France is",
    "Once upon a time, a lighthouse keeper",
    "Three uses of a paper clip are:",
)


def sample_texts(
    dense: LayerStream,
    candidate: LayerStream,
    tokenizer: Any,
    new_tokens: int,
    tick: Callable[[int], None],
    room: int = 0,
) -> dict[str, Any] | None:
    """Both models' continuations of built-in prompts: `{"new_tokens", "chat_template", "texts": [{"prompt",
    "dense", "compressed"}]}`.

    Questions through the tokenizer's chat template, or beginnings to go on from where it has none that can be
    used; None where the tokenizer fails at them. One layer is in memory at a time, and those that stay in
    `room` bytes; `tick(1)` after each token of each model.
    """
    rendered = _rendered(tokenizer)
    prompts = _BEGINNINGS if rendered is None else _QUESTIONS
    read, write = (Aside(functools.partial(work, tokenizer)) for work in (_read, _write))
    try:  # hours of work must not end here
        inputs = read(list(prompts if rendered is None else rendered), rendered is None)
        answers = [write(_continued(stream, inputs, new_tokens, tick, room)) for stream in (dense, candidate)]
    except AsideError:
        return None
    texts = [
        {"prompt": prompt, "dense": x, "compressed": y}
        for prompt, x, y in zip(prompts, *answers, strict=True)
    ]
    return {"new_tokens": new_tokens, "chat_template": rendered is not None, "texts": texts}


def _rendered(tokenizer: Any) -> list[str] | None:
    """The questions as the tokenizer's chat template puts them; None without a template, or with one that
    refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    template = ChatTemplate(tokenizer)
    chats = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    try:
        return [template.render(chat, add_generation_prompt=True) for chat in chats]
    except CalibrationError:  # hours of work must not end here
        return None


@torch.no_grad()
def _continued(
    stream: LayerStream,
    inputs: list[list[int]],
    new_tokens: int,
    tick: Callable[[int], None],
    room: int,
) -> list[list[int]]:
    """All prompts in one batch, padded on the left: a token may cost a pass over all layers' files."""
    from transformers import GenerationConfig

    width = max(len(ids) for ids in inputs)
    prompt = torch.tensor([[0] * (width - len(ids)) + ids for ids in inputs], device=stream.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in inputs], device=stream.device)
    end = stream.model.config.eos_token_id
    padding = end[0] if isinstance(end, list) else end or 0
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=max(0, padding), eos_token_id=end
    )
    with stream.on_demand(tick, room) as model:
        model.generation_config = greedy  # in the place of whatever the model's config asks for
        output = model.generate(prompt, attention_mask=mask)
    return [row.tolist() for row in output[:, width:]]


def _read(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=special)["input_ids"]]


def _write(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


_GRID = (0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60)
_SPECTRUM_POINTS = 64


def loss_by_size(layers: Sequence[Layer], settings: Settings) -> list[dict[str, float]]:
    """The predicted loss at other sizes, as far as the form can go, chosen by predicted losses alone: not
    measured, not priced.
    """
    points, choose = [], CHOOSERS[settings.allocation]
    for removed in sorted({*_GRID, *([] if settings.remove is None else [settings.remove])}):
        try:
            choices = choose(layers, 1.0 - removed, settings.form, settings.rank_multiple)
        except UsageError:  # beyond what the form, or the multiple, can do
            continue
        points.append({"removed_ratio": removed, "predicted_loss": loss(layers, choices)})
    return points


def spectra(layers: Sequence[Layer]) -> dict[str, Any]:
    """Share of the output energy that each matrix loses at (at most 64) ranks of a group from 0 to full, to
    four digits, while it has all its channels.

    `{"ranks": [...], "layers": [{projection: [...]}, ...]}`: all three matrices of a layer have the same full
    rank, min(H, I / groups).
    """
    tails = [[curve.tail for curve in layer[0].curves] for layer in layers]
    ranks = np.unique(np.linspace(0, len(tails[0][0]) - 1, _SPECTRUM_POINTS).round().astype(int))
    lost = [
        [[float(f"{share:.4g}") for share in tail[ranks] / max(float(tail[0]), 1e-300)] for tail in layer]
        for layer in tails
    ]
    return {"ranks": ranks.tolist(), "layers": [dict(zip(PROJECTIONS, layer, strict=True)) for layer in lost]}
