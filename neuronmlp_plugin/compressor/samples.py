"""What the text reads like: the same few prompts, continued greedily by the dense and by the compressed
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neuronmlp_plugin.calibration.stream import LayerStream
from neuronmlp_plugin.calibration.template import ChatTemplate
from neuronmlp_plugin.errors import CalibrationError

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
    dense: LayerStream, candidate: LayerStream, tokenizer: Any, new_tokens: int, tick: Callable[[int], None]
) -> dict[str, Any]:
    """Both models' continuations of built-in prompts: `{"new_tokens", "chat_template", "texts": [{"prompt",
    "dense", "compressed"}]}`.

    Questions through the tokenizer's chat template, or beginnings to go on from where it has none that can be
    used. One layer is in memory at a time; `tick(1)` after each token of each model.
    """
    rendered = _rendered(tokenizer)
    prompts = _BEGINNINGS if rendered is None else _QUESTIONS
    inputs = tokenizer(list(prompts if rendered is None else rendered), add_special_tokens=rendered is None)[
        "input_ids"
    ]
    answers = [_continued(stream, tokenizer, inputs, new_tokens, tick) for stream in (dense, candidate)]
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
    stream: LayerStream, tokenizer: Any, inputs: list[list[int]], new_tokens: int, tick: Callable[[int], None]
) -> list[str]:
    """All prompts in one batch, padded on the left, since every token costs a pass over all layers' files."""
    width = max(len(ids) for ids in inputs)
    prompt = torch.tensor([[0] * (width - len(ids)) + ids for ids in inputs], device=stream.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in inputs], device=stream.device)
    end = stream.model.config.eos_token_id
    padding = end[0] if isinstance(end, list) else end or 0
    with stream.on_demand(tick) as model:
        output = model.generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=padding
        )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output[:, width:]]
