"""Losses at the vocabulary, with their gradient taken by hand and in pieces: logits of all positions would
fill the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Logits in memory at a time, as numbers: 16 MB in fp32, which glibc keeps for the next piece instead of
# asking the kernel for fresh pages.
LOGITS = 2**22
LOGITS_GPU = 2**27  # half a gigabyte: a GPU is idle on smaller ones
NO_TARGET = -1


@torch.no_grad()
def kl_gradient(
    hidden: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """`(sum of KL(p || q), its gradient by hidden [n, H])` for q = softmax(hidden head^T), p =
    softmax(teacher head^T).

    `head [vocabulary, H]`, in whose dtype the products are taken. The gradient by the logits is q - p.
    """
    total, gradients = 0.0, []
    for h, t in zip(*(x.split(_positions(head)) for x in (hidden, teacher)), strict=True):
        log_q, log_p = (F.linear(x.to(head.dtype), head).float().log_softmax(-1) for x in (h, t))
        p = log_p.exp()
        total += float((p * (log_p - log_q)).sum())
        gradients.append((log_q.exp_().sub_(p).to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


@torch.no_grad()
def mixed_gradient(
    hidden: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, share: float
) -> tuple[float, torch.Tensor]:
    """`(sum of (1 - share) KL(p || q) + share (cross entropy of the target), its gradient by hidden [n, H])`.

    `targets [n]`: the token ids that the text has next, NO_TARGET where it ends: there KL counts whole. The
    gradient by the logits is q - ((1 - share) p + share onehot(target)).
    """
    total, gradients = 0.0, []
    for h, t, ids in zip(*(x.split(_positions(head)) for x in (hidden, teacher, targets)), strict=True):
        log_q, log_p = (F.linear(x.to(head.dtype), head).float().log_softmax(-1) for x in (h, t))
        weight = share * (ids != NO_TARGET)[:, None]
        following = ids.clamp_min(0)[:, None]
        p = log_p.exp()
        parts = (1 - weight) * (p * (log_p - log_q)).sum(-1, keepdim=True)
        total += float((parts - weight * log_q.gather(1, following)).sum())
        p.mul_(1 - weight).scatter_add_(1, following, weight.to(p.dtype))
        gradients.append((log_q.exp_().sub_(p).to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


@torch.no_grad()
def next_token_gradient(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """`(sum of cross entropies, its gradient by hidden [n, H])` for the token ids `targets [n]`."""
    total, gradients = 0.0, []
    for h, ids in zip(*(x.split(_positions(head)) for x in (hidden, targets)), strict=True):
        log_q = F.linear(h.to(head.dtype), head).float().log_softmax(-1)
        total += float(F.nll_loss(log_q, ids, reduction="sum"))
        q = log_q.exp_()
        q[torch.arange(len(ids)), ids] -= 1.0
        gradients.append((q.to(head.dtype) @ head).float())
    return total, torch.cat(gradients)


def _positions(head: torch.Tensor) -> int:
    return max(1, (LOGITS_GPU if head.is_cuda else LOGITS) // len(head))
