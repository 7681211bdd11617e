from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import NonFiniteError
from tests.tiny_models import FAMILIES, write_dense, write_mixed


class Bigram:
    """A stream of no layers, whose logits depend on the current token only: its hidden states are the
    logits.
    """

    num_layers, device = 0, torch.device("cpu")

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def embed(self, windows):
        return self.table[windows]

    def head(self):
        return torch.nn.Identity()


def test_streams_give_what_whole_models_give(tmp_path, monkeypatch):
    """Every family, every form, fewer positions at a time than a window has."""
    monkeypatch.setattr("neuronmlp_plugin.calibration.quality.POSITIONS", 5)
    windows = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(5))
    for family in FAMILIES:
        folders = (
            write_dense(tmp_path / family, family),
            write_mixed(tmp_path / f"{family}-mixed", tmp_path / family),
        )
        log_p, log_q = (
            load_model(folder)(windows).logits[:, :-1].detach().log_softmax(-1) for folder in folders
        )
        dense, candidate = (LayerStream(Checkpoint(folder)) for folder in folders)
        found = Judge(dense, windows).compare(candidate)
        losses = [F.nll_loss(log.flatten(0, 1), windows[:, 1:].flatten()).item() for log in (log_p, log_q)]
        assert found.reference_perplexity == pytest.approx(math.exp(losses[0]), rel=1e-4)
        assert found.candidate_perplexity == pytest.approx(math.exp(losses[1]), rel=1e-4)
        assert found.kl_divergence == pytest.approx(
            (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3
        )
        assert found.top1_agreement == pytest.approx(
            (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
        )
        assert found.kl_divergence > 0.01 and found.num_tokens == 66


def test_numbers_of_a_model_that_can_be_worked_out_by_hand():
    uniform, sure = torch.zeros(4, 4), torch.eye(4).roll(1, 1) * 50
    windows = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    quality = Judge(Bigram(sure), windows).compare(Bigram(uniform))
    assert quality.num_tokens == 6
    assert quality.reference_perplexity == pytest.approx(1.0)
    assert quality.candidate_perplexity == pytest.approx(4.0)
    assert quality.kl_divergence == pytest.approx(math.log(4))
    assert quality.perplexity_ratio == pytest.approx(4.0)


def test_a_model_agrees_with_itself():
    model = Bigram(torch.randn(9, 9))
    quality = Judge(model, torch.randint(0, 9, (3, 8))).compare(model)
    assert (quality.kl_divergence, quality.top1_agreement, quality.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_a_window_with_nan_logits_ends_the_run():
    table = torch.zeros(4, 4)
    broken = table.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="window 1"):
        Judge(Bigram(table), torch.tensor([[0, 1, 2, 2], [0, 3, 1, 1]])).compare(Bigram(broken))
