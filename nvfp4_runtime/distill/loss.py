"""The distance of two models' answers, a few hundred positions at a time: no [tokens, vocabulary] matrix is ever held.

The gradient of every chunk is made with its value, so the backward pass has nothing left to do but to hand it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

Loss = Literal["kl", "ce", "mse"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
CHUNK = 256


@dataclass
class Sums:
    """Sums over positions, in float64 on the CPU. `ce` counts over labels, which the last position of a row lacks."""

    kl: float = 0.0
    ce: float = 0.0
    teacher_ce: float = 0.0
    agree: int = 0
    positions: int = 0
    labels: int = 0

    def add(self, other: Sums) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def means(self) -> dict[str, float]:
        labels, positions = max(1, self.labels), max(1, self.positions)
        return {
            "kl": self.kl / positions,
            "ce": self.ce / labels,
            "teacher_ce": self.teacher_ce / labels,
            "top1": self.agree / positions,
        }


def chunked_loss(
    kind: Loss,
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    sums: Sums,
    chunk: int = CHUNK,
) -> Tensor:
    """The summed loss over all positions; its figures are added to `sums`.

    hidden          [T, H] what enters the student's head; teacher_hidden [T, H'] the teacher's
    head            [V, H], teacher_head [V, H']
    labels          int64 [T], -1 where there is none
    "kl" is D(teacher || student) at temperature 1 over the whole vocabulary, "ce" the labels' negative log-likelihood,
    "mse" the mean squared difference of logits. A teacher may be left out for "ce".
    """
    loss: Tensor = _Chunked.apply(hidden, head, kind, teacher_hidden, teacher_head, labels, sums, chunk)
    return loss


class _Chunked(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        kind: Loss,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        sums: Sums,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if wants_head else None
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, hidden.shape[0], chunk):
            span = slice(start, start + chunk)
            z = (hidden[span] @ head.t()).to(torch.float32)
            z_teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                z_teacher = (teacher_hidden[span] @ teacher_head.t()).to(torch.float32)
            value, dz = _one_chunk(kind, z, z_teacher, labels[span], sums, wants_hidden or wants_head)
            total += value
            if dz is not None:
                dz = dz.to(hidden.dtype)
                if d_hidden is not None:
                    torch.mm(dz, head, out=d_hidden[span])
                if d_head is not None:
                    d_head += dz.t() @ hidden[span]
        ctx.save_for_backward(*[d for d in (d_hidden, d_head) if d is not None])
        ctx.wants = (wants_hidden, wants_head)
        ctx.head_dtype = head.dtype
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        scale = float(grads[0])
        d_hidden = saved.pop(0) * scale if ctx.wants[0] else None
        d_head = (saved.pop(0) * scale).to(ctx.head_dtype) if ctx.wants[1] else None
        return d_hidden, d_head, None, None, None, None, None, None


def _one_chunk(
    kind: Loss, z: Tensor, z_teacher: Tensor | None, labels: Tensor, sums: Sums, wants_grad: bool
) -> tuple[float, Tensor | None]:
    """Value and gradient by the student's logits `z` [t, V]; `z` and `z_teacher` are used up."""
    labelled = labels >= 0
    index = labels.clamp(min=0).unsqueeze(1)
    lse = torch.logsumexp(z, dim=1)
    ce = float((lse - z.gather(1, index).squeeze(1))[labelled].sum(dtype=torch.float64))
    kl, teacher_p, best = 0.0, None, None
    squares, difference = 0.0, None
    if z_teacher is not None:
        best = z_teacher.argmax(dim=1)
        lse_teacher = torch.logsumexp(z_teacher, dim=1)
        teacher_ce = lse_teacher - z_teacher.gather(1, index).squeeze(1)
        sums.teacher_ce += float(teacher_ce[labelled].sum(dtype=torch.float64))
        sums.agree += int((z.argmax(dim=1) == best).sum())
        teacher_p = torch.exp(z_teacher - lse_teacher.unsqueeze(1))
        # sum p (log p - log q) = sum p (z_t - z) - lse_t + lse
        difference = z_teacher.sub_(z)
        each = torch.linalg.vecdot(teacher_p, difference) - lse_teacher + lse
        kl = float(each.sum(dtype=torch.float64))
        if kind == "mse":
            squares = float(difference.square().mean(dim=1).sum(dtype=torch.float64))
    sums.kl += kl
    sums.ce += ce
    sums.positions += z.shape[0]
    sums.labels += int(labelled.sum())
    value = {"kl": kl, "ce": ce, "mse": squares}[kind]
    if not wants_grad:
        return value, None
    if kind == "mse":
        assert difference is not None  # the trainer gives a teacher for every loss but "ce"
        return value, difference.mul_(-2.0 / z.shape[1])
    dz = z.sub_(lse.unsqueeze(1)).exp_()
    if kind == "kl":
        assert teacher_p is not None
        return value, dz.sub_(teacher_p)
    dz.mul_(labelled.unsqueeze(1))
    dz.scatter_add_(1, index, -labelled.to(dz.dtype).unsqueeze(1))
    return value, dz
