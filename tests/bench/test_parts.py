"""What a profile adds up; clocks are stand-ins, and no time is asserted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from neuronmlp_plugin.bench.parts import AROUND, BETWEEN, part_of, timed_parts


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Linear(2, 2)
        self.layers = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 2)), "norm": nn.LayerNorm(2)})

    def forward(self, x):
        return self.layers["mlp"](self.layers["norm"](self.embed_tokens(x)))


def test_parts_add_up_to_all_that_passed():
    clock = itertools.count().__next__
    model = Model()
    with timed_parts(model, clock) as parts:
        model(torch.zeros(1, 2))
    # One tick between two readings: each part's own call has one, and what is around it the others.
    assert {part: parts[part] for part in ("embedding", "norms", "MLP")} == dict.fromkeys(
        ("embedding", "norms", "MLP"), 1
    )
    assert (parts[BETWEEN], parts[AROUND]) == (4, 2)
    assert sum(parts.values()) == 9  # readings 0 to 9


def test_the_model_is_as_before_afterwards():
    model = Model()
    model.layers["mlp"].forward = torch.clone
    with pytest.raises(RuntimeError), timed_parts(model, lambda: 0.0):
        model(torch.zeros(1, 3))
    with_own = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert with_own == ["layers.mlp"] and model.layers["mlp"].forward is torch.clone


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.qkv_proj", "attention's linear layers"),
        ("model.layers.3.self_attn.attn", "attention"),
        ("model.layers.3.post_attention_layernorm", "norms"),
        ("model.norm", "norms"),
        ("model.layers.3.mlp", "MLP"),
        ("model.layers.3.mlp.gate_up_proj", None),
        ("logits_processor", "head"),
        ("model.layers.3", None),
    ],
)
def test_modules_are_parts_by_their_names(name, part):
    assert part_of(name) == part
