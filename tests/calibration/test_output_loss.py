"""The gradients that are taken by hand, against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from neuronmlp_plugin.calibration import quality


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(quality, "LOGITS", 3 * 50)  # pieces of three rows, and a ragged last one


def test_kl_and_its_gradient():
    torch.manual_seed(0)
    hidden, teacher, head = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8), torch.randn(50, 8)
    expected = F.kl_div(
        (hidden @ head.T).log_softmax(-1),
        (teacher @ head.T).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    expected.backward()
    loss, gradient = quality.kl_gradient(hidden.detach(), teacher, head)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_no_divergence_from_itself_and_no_gradient():
    hidden, head = torch.randn(5, 8), torch.randn(50, 8)
    loss, gradient = quality.kl_gradient(hidden, hidden, head)
    assert loss == pytest.approx(0.0, abs=1e-6) and float(gradient.abs().max()) < 1e-5


def test_next_token_loss_and_its_gradient():
    torch.manual_seed(1)
    hidden, head, targets = (
        torch.randn(10, 8, requires_grad=True),
        torch.randn(50, 8),
        torch.randint(0, 50, (10,)),
    )
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    expected.backward()
    loss, gradient = quality.next_token_gradient(hidden.detach(), targets, head)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_the_mixture_and_its_gradient():
    torch.manual_seed(2)
    hidden, teacher, head = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (10,))
    targets[[3, 9]] = quality.NO_TARGET
    log_q, log_p = (x @ head.T for x in (hidden, teacher))
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    known = targets != quality.NO_TARGET
    text = F.nll_loss(log_q, targets.clamp_min(0), reduction="none")
    expected = torch.where(known, 0.75 * kl + 0.25 * text, kl).sum()
    expected.backward()
    loss, gradient = quality.mixed_gradient(hidden.detach(), teacher, targets, head, 0.25)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_mixture_without_text_is_kl():
    torch.manual_seed(3)
    hidden, teacher, head = torch.randn(10, 8), torch.randn(10, 8), torch.randn(50, 8)
    mixed = quality.mixed_gradient(hidden, teacher, torch.randint(0, 50, (10,)), head, 0.0)
    loss, gradient = quality.kl_gradient(hidden, teacher, head)
    assert mixed[0] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(mixed[1], gradient, rtol=1e-4, atol=1e-6)
