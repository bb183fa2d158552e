"""The chunked losses and their gradients are autograd's on whole logits."""

import pytest
import torch

from nvfp4_runtime.distill.loss import Sums, chunked_loss

T, H, V = 23, 8, 40


def case():
    g = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(T, H, generator=g), torch.randn(T, H, generator=g)
    head, teacher_head = torch.randn(V, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[[4, T - 1]] = -1
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def whole(kind, hidden, head, teacher, teacher_head, labels):
    z, z_teacher = hidden @ head.t(), teacher @ teacher_head.t()
    if kind == "ce":
        return torch.nn.functional.cross_entropy(z, labels, ignore_index=-1, reduction="sum")
    if kind == "mse":
        return (z - z_teacher).square().mean(dim=1).sum()
    log_p, log_q = z_teacher.log_softmax(1), z.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_value_and_gradients_are_those_of_whole_logits(kind, chunk):
    hidden, head, teacher, teacher_head, labels = case()
    expected = whole(kind, hidden, head, teacher, teacher_head, labels)
    wanted = torch.autograd.grad(expected, (hidden, head))
    sums = Sums()
    loss = chunked_loss(kind, hidden, head, teacher, teacher_head, labels, sums, chunk)
    found = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kl = whole("kl", hidden, head, teacher, teacher_head, labels)
    ce = whole("ce", hidden, head, teacher, teacher_head, labels)
    assert sums.means()["kl"] == pytest.approx(float(kl) / T, rel=1e-5)
    assert sums.means()["ce"] == pytest.approx(float(ce) / (T - 2), rel=1e-5)
    assert (sums.positions, sums.labels) == (T, T - 2)


def test_cross_entropy_needs_no_teacher():
    hidden, head, teacher, teacher_head, labels = case()
    loss = chunked_loss("ce", hidden, head, None, None, labels, Sums())
    torch.testing.assert_close(loss, whole("ce", hidden, head, teacher, teacher_head, labels).detach())


def test_a_model_has_no_distance_from_itself():
    hidden, head, _, _, labels = case()
    sums = Sums()
    loss = chunked_loss("kl", hidden, head, hidden.detach(), head.detach(), labels, sums)
    assert abs(float(loss.detach())) < 1e-4
    assert sums.means()["top1"] == 1.0
    assert float(torch.autograd.grad(loss, hidden)[0].abs().max()) < 1e-6
