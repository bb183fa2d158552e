"""What is trained is what is served: the student's logits are the engine's, before training and after."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.distill.export import export_student
from nvfp4_runtime.distill.fake_quant import weight_operand
from nvfp4_runtime.distill.hf import head_weight, hidden_states, load_plain
from nvfp4_runtime.distill.student import build_student
from nvfp4_runtime.errors import ConfigError, UnsupportedFormatError
from nvfp4_runtime.quantize.pipeline import quantize_folder
from tests import tiny
from tests.distill.conftest import TEXT
from tests.models.paged import PagedRunner, load_or_skip

IDS = list(TEXT[500:700].encode())
CPU = torch.device("cpu")


@torch.no_grad()
def answers(student) -> torch.Tensor:
    hidden = hidden_states(student.model, torch.tensor([IDS]))
    return hidden @ head_weight(student.model).t()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def disturb(student) -> None:
    """As an optimizer step would, only more."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for master in student.masters.values():
            master.mul_(1 + 0.1 * torch.randn(master.shape, generator=g))
    student.refresh()


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
@pytest.mark.parametrize("start", ["awq", "plainly"])
def test_exported_students_answer_through_the_reference_as_they_did_in_training(
    teacher, start, numerics, tmp_path, request
):
    folder = request.getfixturevalue(start)
    student = build_student(teacher, folder, numerics, dtype=torch.float32)
    disturb(student)
    export_student(student, tmp_path / "out")
    served = PagedRunner(load_or_skip(tmp_path / "out", numerics=numerics)).run((0, IDS))[0]
    found = answers(student)
    # Float32 sums in other orders. In W4A4 they move a rounded activation here and there, and what comes after it: so
    # nearly all answers are equal, and none is another model's.
    close = (found - served).abs().amax(dim=1) < 2e-3
    assert float(close.float().mean()) > (0.999 if numerics == "w4a16" else 0.8)
    kl = (served.softmax(-1) * (served.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    assert float(kl.mean()) < (1e-6 if numerics == "w4a16" else 1e-3)


def test_every_tensor_of_the_start_that_was_not_trained_is_exported_as_it_was(teacher, awq, tmp_path):
    student = build_student(teacher, awq, "w4a4", train="layers")
    disturb(student)
    export_student(student, tmp_path / "out")
    before, after = load_file(awq / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name in before if same_bits(before[name], after[name])}
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    kept = {name for name in before if name.endswith(("scale", "scale_2")) or name in outside}
    assert before.keys() == after.keys()
    assert same == kept
    for name in ("config.json", "hf_quant_config.json", "tokenizer.json"):
        assert (awq / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("start", ["awq", "plainly"])
def test_training_starts_inside_the_steps_where_the_teacher_was(teacher, start, request):
    folder = request.getfixturevalue(start)
    student = build_student(teacher, folder, "w4a16", dtype=torch.float32)
    stored = Checkpoint.open(folder)
    inside = 0
    for name, layer in student.layers.items():
        operand = stored.linear(name, layer.linear.out_features, layer.linear.in_features).operand()
        found = weight_operand(layer.weights, layer.block_scale, layer.scale_2)
        assert float((found == operand.float()).float().mean()) > 0.97
        inside += not torch.equal(layer.weights, found * layer.scale_2)
    assert inside == len(student.layers)
    # undone by one another, the folded factors leave the teacher's function: its weights in float32, its answers
    for layer in student.layers.values():
        layer.linear.weight.data = layer.weights / layer.scale_2
    plain = load_plain(teacher, torch.float32, CPU)
    with torch.no_grad():
        expected = hidden_states(plain, torch.tensor([IDS])) @ head_weight(plain).t()
    torch.testing.assert_close(answers(student), expected, rtol=1e-3, atol=1e-3)


def test_codes_that_the_teacher_does_not_explain_are_started_from_as_they_are(teacher, tmp_path):
    quantize_folder(
        teacher, tmp_path / "gptq", method="gptq", calib_texts=[TEXT[:3000]], numerics="w4a4", progress=False
    )
    student = build_student(teacher, tmp_path / "gptq", "w4a4")
    stored = Checkpoint.open(tmp_path / "gptq")
    for name, layer in student.layers.items():
        weight = stored.linear(name, layer.linear.out_features, layer.linear.in_features)
        assert torch.equal(layer.linear.weight, weight.operand())


def test_gradients_are_those_of_rounded_operands_passed_straight_through(teacher, awq):
    student = build_student(teacher, awq, "w4a4", dtype=torch.float32)
    name, layer = next(iter(student.layers.items()))
    x = torch.randn(5, layer.linear.in_features, generator=torch.Generator().manual_seed(2)).requires_grad_()
    layer.linear.site.readers = 1
    y = layer.linear(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(g)
    scale = layer.linear.site.input_scale
    rounded = layer.linear.site.operand(x.detach()) * scale
    weights = layer.linear.weight.detach() * layer.scale_2
    torch.testing.assert_close(y.detach(), rounded @ weights.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, g @ weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.masters[f"{name}.weight"].grad, g.t() @ rounded, rtol=1e-5, atol=1e-5)
    assert layer.linear.weight.grad is None


def test_block_scales_learn_by_their_own_derivative(teacher, plainly):
    student = build_student(teacher, plainly, "w4a16", dtype=torch.float32, train="scales")
    assert all(name.endswith(".steps") for name in student.masters)
    layer = next(iter(student.layers.values()))
    g = torch.randn(layer.weights.shape, generator=torch.Generator().manual_seed(4))
    blocks, step = layer.weights.reshape(-1, 16), (layer.block_scale.float() * layer.scale_2).reshape(-1, 1)
    codes = (layer.linear.weight.reshape(-1, 16) / layer.block_scale.float().reshape(-1, 1)).round(decimals=1)
    exact = blocks / step
    moved = torch.where(exact.abs() <= 6, codes - exact, codes)
    torch.testing.assert_close(layer.to_master(g).flatten(), (g.reshape(-1, 16) * moved).sum(1), rtol=1e-4, atol=1e-5)


def test_w4a4_of_a_student_without_input_scales_is_refused(teacher, tmp_path):
    quantize_folder(teacher, tmp_path / "q", method="max", progress=False)
    with pytest.raises(ConfigError, match=r"have no input_scale.*--act w4a16"):
        build_student(teacher, tmp_path / "q", "w4a4")


def test_fused_experts_are_refused_by_name(tmp_path):
    config = tiny.qwen3_moe_config()
    tensors = tiny.random_tensors(config)
    plain = tiny.write_plain(tmp_path / "plain", config, tensors)
    packed = tiny.write_modelopt(tmp_path / "packed", config, tensors)
    with pytest.raises(UnsupportedFormatError, match=r"experts.*cannot be distilled here yet"):
        build_student(plain, packed, "w4a4")
