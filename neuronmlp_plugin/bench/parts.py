"""Where a step's time goes: each part of a vLLM model timed as its modules are called.

A module's `forward` is exchanged for one that adds up how long it took, less what other parts inside of it
took, so that the parts of a step add up to the step. The rest of the model's forward (its own Python, adding
residuals) is "between layers", and whatever is outside of it "vLLM around": scheduling, preparing inputs,
sampling, answering.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

AROUND, BETWEEN = "vLLM around", "between layers"
# By the end of a module's name; the first that fits.
PARTS = {
    ".qkv_proj": "attention's linear layers",
    ".o_proj": "attention's linear layers",
    ".rotary_emb": "rotary",
    ".attn": "attention",
    ".mlp": "MLP",
    "norm": "norms",
    "embed_tokens": "embedding",
    "logits_processor": "head",
}


def part_of(name: str) -> str | None:
    """Which part a module of this name is; None for one inside or around the parts.

    >>> part_of("model.layers.3.self_attn.o_proj"), part_of("model.layers.3.mlp.down_proj")
    ("attention's linear layers", None)
    """
    return next((part for end, part in PARTS.items() if name.endswith(end)), None)


class Stopwatch:
    """Seconds of each part so far, of calls that may lie in one another."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, dict.fromkeys([*PARTS.values(), BETWEEN], 0.0)
        self.inside = 0.0  # seconds of parts that ended within the call that is open

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # What has ended inside the caller so far is put aside: `inside` now counts for this call.
            outer, self.inside = self.inside, 0.0
            begin = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                took = self.clock() - begin
                self.seconds[part] += took - self.inside
                self.inside = outer + took

        return wrapped


@contextmanager
def timed_parts(model: nn.Module, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by part, of all that the model does meanwhile; AROUND is the rest, once it has ended."""
    watch, begin = Stopwatch(clock), clock()
    modules = [(module, part_of(name)) for name, module in model.named_modules()]
    changed = [(module, part) for module, part in [*modules, (model, BETWEEN)] if part]
    for module, part in changed:
        module.forward = watch.timed(part, module.forward)
    try:
        yield watch.seconds
    finally:
        for module, _ in changed:
            del module.forward  # of the object; its class's is there again
        watch.seconds[AROUND] = clock() - begin - sum(watch.seconds.values())
