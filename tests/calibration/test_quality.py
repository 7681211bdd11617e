from __future__ import annotations

import math

import pytest
import torch

from neuronmlp_plugin.calibration.quality import compare
from neuronmlp_plugin.errors import NonFiniteError


class Bigram(torch.nn.Module):
    """Logits that depend on the current token only."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids):
        return type("Output", (), {"logits": self.table[ids]})


def test_numbers_of_a_model_that_can_be_worked_out_by_hand():
    uniform, sure = torch.zeros(4, 4), torch.eye(4).roll(1, 1) * 50
    windows = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    quality = compare(Bigram(sure), Bigram(uniform), windows)
    assert quality.num_tokens == 6
    assert quality.reference_perplexity == pytest.approx(1.0)
    assert quality.candidate_perplexity == pytest.approx(4.0)
    assert quality.kl_divergence == pytest.approx(math.log(4))
    assert quality.perplexity_ratio == pytest.approx(4.0)


def test_a_model_agrees_with_itself():
    model = Bigram(torch.randn(9, 9))
    quality = compare(model, model, torch.randint(0, 9, (3, 8)))
    assert (quality.kl_divergence, quality.top1_agreement, quality.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_a_window_with_nan_logits_ends_the_run():
    table = torch.zeros(4, 4)
    broken = table.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="window 1"):
        compare(Bigram(table), Bigram(broken), torch.tensor([[0, 1, 2, 2], [0, 3, 1, 1]]))
