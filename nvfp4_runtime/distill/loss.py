"""The distance of two models' answers, a few hundred positions at a time: no [tokens, vocabulary] matrix is ever held.

The gradient of every chunk is made with its value, so the backward pass has nothing left to do but to hand it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from nvfp4_runtime.distill.compilation import compiled

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
    apply: Callable[..., Tensor] = _Chunked.apply  # torch leaves it untyped
    return apply(hidden, head, kind, teacher_hidden, teacher_head, labels, sums, chunk)


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
            z = hidden[span] @ head.t()
            z_teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                z_teacher = teacher_hidden[span] @ teacher_head.t()
            value, dz = _one_chunk(kind, z, z_teacher, labels[span], sums, wants_hidden or wants_head)
            total += value
            if dz is not None:
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
    """Value, and gradient by the student's logits `z` [t, V]."""
    labelled = (labels >= 0).to(torch.float32)
    index = labels.clamp(min=0).unsqueeze(1)
    if z_teacher is None:
        assert kind == "ce"  # the trainer gives a teacher for every other loss
        ce, dz = compiled(_alone, False)(z, index, labelled)
        kl, value = 0.0, _total(ce)
    else:
        each, ce, teacher_ce, agree, dz = compiled(_against, False)(kind, z, z_teacher, index, labelled)
        kl = _total(each["kl"])
        value = _total(ce) if kind == "ce" else _total(each[kind])
        sums.teacher_ce += _total(teacher_ce)
        sums.agree += int(agree.sum())
    sums.kl += kl
    sums.ce += _total(ce)
    sums.positions += z.shape[0]
    sums.labels += int(labelled.sum())
    return value, dz if wants_grad else None


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [t, V] and log sum exp [t, 1] of float32 logits."""
    largest = z.amax(dim=1, keepdim=True)
    e = torch.exp(z - largest)
    total = e.sum(dim=1, keepdim=True)
    return e / total, largest + total.log()


def _alone(z: Tensor, index: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Labels' negative log-likelihood [t], and its gradient [t, V] in z's dtype."""
    logits = z.to(torch.float32)
    p, lse = _softmax(logits)
    ce = (lse - logits.gather(1, index)).squeeze(1) * labelled
    return ce, _minus_label(p, index, labelled).to(z.dtype)


def _against(
    kind: Loss, z: Tensor, z_teacher: Tensor, index: Tensor, labelled: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """({"kl", "mse"} [t], both models' label losses [t], same top token [t], gradient of `kind`'s loss [t, V])."""
    ours, theirs = z.to(torch.float32), z_teacher.to(torch.float32)
    q, lse = _softmax(ours)
    p, lse_teacher = _softmax(theirs)
    difference = theirs - ours
    # sum p (log p - log q), the two sums of exponentials taken out
    each = {"kl": (p * difference).sum(dim=1) + (lse - lse_teacher).squeeze(1)}
    ce = (lse - ours.gather(1, index)).squeeze(1) * labelled
    teacher_ce = (lse_teacher - theirs.gather(1, index)).squeeze(1) * labelled
    agree = ours.argmax(dim=1) == theirs.argmax(dim=1)
    if kind == "kl":
        dz = q - p
    elif kind == "ce":
        dz = _minus_label(q, index, labelled)
    else:
        each["mse"] = difference.square().mean(dim=1)
        dz = difference * (-2.0 / z.shape[1])
    return each, ce, teacher_ce, agree, dz.to(z.dtype)


def _minus_label(p: Tensor, index: Tensor, labelled: Tensor) -> Tensor:
    """(p - onehot) where there is a label, else 0."""
    words = torch.arange(p.shape[1], device=p.device)
    return (p - (words == index).to(p.dtype)) * labelled.unsqueeze(1)
