"""Run a decoder one layer at a time, with one layer's weights in memory, straight from the checkpoint's
files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronmlp_plugin.checkpoint.loader import build_skeleton, swap_projections
from neuronmlp_plugin.checkpoint.reader import Checkpoint, FactorFile
from neuronmlp_plugin.errors import NonFiniteError, UsageError
from neuronmlp_plugin.lowrank.decompose import all_finite

CPU = torch.device("cpu")


def best_device() -> torch.device:
    """The GPU where there is one, as every command takes it."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


class LayerStream:
    """The layers of a dense or factored checkpoint, loaded on demand in `dtype` (fp32) on `device`.

    Hidden states are `[windows, S, H]`; every window starts at position 0 and attention is causal. They stay
    where the caller keeps them: `run` takes a batch to the device and brings nothing back. `factors` is laid
    over a dense checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        factors: FactorFile | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint, self.factors, self.dtype, self.device = checkpoint, factors, dtype, device
        self.model = build_skeleton(checkpoint).eval().requires_grad_(False)
        block = factors.block if factors is not None else checkpoint.block
        if block is not None:
            swap_projections(self.model, block)
        self.model.model.rotary_emb.to(device)
        # Without a mask tensor sdpa takes its causal path, whole: `run` refuses what a sliding window would
        # cut.
        self.model.config._attn_implementation = "sdpa"

    @property
    def num_layers(self) -> int:
        return len(self.model.model.layers)

    def load(self, index: int) -> nn.Module:
        """Layer `index` with its weights; call `release` when done."""
        layer = self.model.model.layers[index]
        self._fill(layer, f"model.layers.{index}.")
        return layer

    def release(self, index: int) -> None:
        # Back to shapes without memory; the module itself stays, for the next `load`.
        self.model.model.layers[index].to_empty(device="meta")

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Token ids `[windows, S]` -> hidden states on the CPU. Looked up as stored: a whole table in fp32
        would be 2 GB at 8B.
        """
        return F.embedding(windows, self.checkpoint.tensor("model.embed_tokens.weight")).to(self.dtype)

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over some windows; the output lies on the stream's device."""
        limit = getattr(self.model.config, "sliding_window", None)
        if (
            limit is not None
            and getattr(self.model.config, "use_sliding_window", True)
            and hidden.shape[1] > limit
        ):
            raise UsageError(
                f"--window: expected at most the model's sliding window, {limit} tokens, found "
                f"{hidden.shape[1]}."
            )
        hidden = hidden.to(self.device)
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        rotary = self.model.model.rotary_emb(hidden, positions)
        output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        # A layer of transformers 4 may return a tuple.
        output = output[0] if isinstance(output, tuple) else output
        if not all_finite(output.detach()):
            raise NonFiniteError(
                f"{self.checkpoint.folder}: expected finite activations, found NaN or Inf in the forward "
                "pass; check the weights."
            )
        return output

    def head(self) -> nn.Sequential:
        """Final norm and output matrix: hidden states -> logits."""
        norm = self.model.model.norm
        self._fill(norm, "model.norm.")
        return nn.Sequential(norm, _Output(self._tensor(self._head_name())))

    @contextlib.contextmanager
    def on_demand(self, tick: Callable[[int], None], room: int = 0) -> Iterator[Any]:
        """The whole Hugging Face model, whose layers load when they are called and go when they are done, but
        for the first ones, as many as `room` bytes hold; `tick(1)` after each pass.
        """
        _, output = self.head()
        self.model.lm_head, self.model.model.embed_tokens = output, _Lookup(self)
        with contextlib.ExitStack() as hooks:
            hooks.callback(output.to, "meta")  # another model's head comes next
            for index, layer in enumerate(self.model.model.layers):
                hooks.enter_context(layer.register_forward_pre_hook(functools.partial(self._before, index)))
                room -= sum(t.numel() for t in layer.state_dict().values()) * self.dtype.itemsize
                if room < 0:
                    hooks.enter_context(layer.register_forward_hook(functools.partial(self._after, index)))
                hooks.callback(self.release, index)
            hooks.enter_context(self.model.register_forward_hook(lambda *_: tick(1)))
            yield self.model

    def _before(self, index: int, layer: nn.Module, _: Any) -> None:
        if next(layer.parameters()).is_meta:
            self.load(index)

    def _after(self, index: int, *_: Any) -> None:
        self.release(index)

    def _head_name(self) -> str:
        return (
            "lm_head.weight" if "lm_head.weight" in self.checkpoint.shapes() else "model.embed_tokens.weight"
        )

    def _tensor(self, name: str) -> torch.Tensor:
        # The prefixes are of changed MLPs alone: everything else of the layer is the dense folder's.
        if self.factors is not None and name.startswith(tuple(self.factors.prefixes)):
            return self.factors.tensor(name).to(self.device, self.dtype)
        return self.checkpoint.tensor(name).to(self.device, self.dtype)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state: dict[str, Any] = {name: self._tensor(prefix + name) for name in module.state_dict()}
        # assign: a parameter on the meta device has nothing that could be copied into.
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)


class _Lookup(nn.Module):
    """An embedding that reads the rows it needs."""

    def __init__(self, stream: LayerStream) -> None:
        super().__init__()
        self.stream = stream
        # transformers takes a model to be where its first parameter is: without this one, nowhere (meta).
        self.place = nn.Parameter(torch.empty(0, device=stream.device), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.stream.embed(tokens.cpu()).to(self.stream.device)


class _Output(nn.Module):
    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)
