"""Perplexity and KL through the engine are those of plain transformers; a model does not differ from itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.evaluate import evaluate as module
from nvfp4_runtime.evaluate.evaluate import evaluate
from nvfp4_runtime.evaluate.report import Report, render, to_json
from nvfp4_runtime.evaluate.scorer import Side
from nvfp4_runtime.evaluate.windows import Windows, cut
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.tiny import llama_config, random_tensors, tiny_llama, tiny_nvfp4_llama, write_plain

# Two layers in float32, sums in other orders: logits within 1e-4 (tests/models), log-probabilities within 2e-4, and a
# mean over positions within that. KL's first-order terms cancel: p and q both sum to 1.
TOLERANCE = 2e-4
TEXT = "".join(f"The {i}th sentence of a text that nobody wrote, with {i * i} words.\n" for i in range(40))
WINDOW, COUNT = 300, 3  # more than one chunk of 256 tokens


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_nvfp4_llama(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def tokenizer(plain: Path) -> Tokenizer:
    return Tokenizer.load(plain)


@pytest.fixture(scope="module")
def windows(tokenizer: Tokenizer) -> Windows:
    return cut(tokenizer, TEXT, WINDOW, COUNT)


def side(folder: Path, **options: Any) -> Side:
    return Side(folder, dtype="float32", **{"numerics": "auto", **options})


@torch.inference_mode()
def transformers_log_probs(plain: Path, packed: Path | None, windows: Windows) -> list[Tensor]:
    """Per window float64 [W - 1, V]; with `packed`, its dequantised weights stand in the linear layers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    replaced = 0
    if packed is not None:
        checkpoint = Checkpoint.open(packed)
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                weight = checkpoint.linear(name, layer.out_features, layer.in_features)
                assert isinstance(weight, NVFP4Weight)
                layer.weight.copy_(weight.dequantize())
                replaced += 1
        assert replaced == 14
    return [model(torch.tensor([w])).logits[0, :-1].double().log_softmax(-1) for w in windows.ids]


def test_perplexity_and_kl_are_those_of_transformers(
    plain: Path, packed: Path, windows: Windows, tokenizer: Tokenizer
) -> None:
    report = evaluate([side(packed, numerics="w4a16")], windows, tokenizer, side(plain), two_pass=False)
    targets = [torch.tensor(w[1:]).unsqueeze(1) for w in windows.ids]
    teacher, student = (transformers_log_probs(plain, p, windows) for p in (None, packed))
    nlls = [
        [float(-rows.gather(1, ids).mean()) for rows, ids in zip(model, targets, strict=True)]
        for model in (teacher, student)
    ]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(teacher, student, strict=True)])
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(teacher, student, strict=True)])
    assert report.teacher is not None
    (measured,) = report.students
    found = measured.divergence
    assert found is not None
    assert report.teacher.nll.mean == pytest.approx(sum(nlls[0]) / COUNT, abs=TOLERANCE)
    assert measured.nll.mean == pytest.approx(sum(nlls[1]) / COUNT, abs=TOLERANCE)
    assert measured.perplexity.mean == pytest.approx(math.exp(sum(nlls[1]) / COUNT), rel=TOLERANCE)
    assert found.nll_difference.mean == pytest.approx((sum(nlls[1]) - sum(nlls[0])) / COUNT, abs=TOLERANCE)
    assert found.kl.mean == pytest.approx(float(kl.mean()), abs=TOLERANCE)
    assert found.kl.mean > 10 * TOLERANCE, "the student must differ for this to mean anything"
    assert found.kl_percentiles["p90"] == pytest.approx(float(kl.quantile(0.9)), abs=TOLERANCE)
    assert found.kl_percentiles["max"] == pytest.approx(float(kl.max()), abs=TOLERANCE)
    # two best tokens within 2e-4 of each other may change places: at most one in a hundred positions here
    assert found.top1_agreement.mean == pytest.approx(float(same.double().mean()), abs=0.01)
    assert report.num_scored == len(kl) == COUNT * (WINDOW - 1)

    worst = found.worst[0]
    where = int(kl.argmax())
    assert (worst.window, worst.position) == (where // (WINDOW - 1), where % (WINDOW - 1) + 1)
    tokens = windows.ids[worst.window]
    assert worst.context == tokenizer.decode(tokens[max(0, worst.position - 16) : worst.position])
    assert worst.token == tokenizer.token_text(tokens[worst.position])
    assert worst.teacher_prob == pytest.approx(float(teacher[worst.window][worst.position - 1].max().exp()), rel=1e-3)


def test_a_model_does_not_differ_from_itself(packed: Path, windows: Windows, tokenizer: Tokenizer) -> None:
    for numerics in ("w4a16", "w4a4"):
        one = Side(packed, numerics)
        (measured,) = evaluate([one], windows, tokenizer, one).students
        assert measured.divergence is not None
        assert measured.divergence.kl.mean == 0
        assert set(measured.divergence.kl_percentiles.values()) == {0.0}
        assert measured.divergence.top1_agreement.mean == 1
        assert measured.numerics == numerics


def test_two_passes_give_the_bits_of_one(plain: Path, packed: Path, windows: Windows, tokenizer: Tokenizer) -> None:
    students = [Side(packed, "w4a16"), Side(packed, "w4a4"), Side(packed, "w4a16", kv_dtype="fp8")]
    reports = [evaluate(students, windows, tokenizer, Side(plain), two_pass=two_pass) for two_pass in (False, True)]
    assert figures(reports[0]) == figures(reports[1])
    alone = evaluate(students, windows, tokenizer)
    assert [one.nll for one in alone.students] == [one.nll for one in reports[0].students]
    assert len({one.nll.mean for one in alone.students}) == 3, "numerics and KV type must reach the engine"


def figures(report: Report) -> list[Any]:
    everyone = [report.teacher, *report.students]
    return [(one.nll, one.perplexity, one.divergence) for one in everyone if one is not None]


def test_models_too_large_to_share_the_memory_take_two_passes_and_say_so(
    plain: Path, packed: Path, windows: Windows, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 1000)
    report = evaluate([Side(packed)], windows, tokenizer, Side(plain), worst=0)
    assert any("two passes" in note for note in report.notes)
    assert report.notes[0] in render(report)


def test_engine_perplexity_equals_the_servers_own_prompt_scores(packed: Path, windows: Windows) -> None:
    """The path a client takes, scheduler and sampler included; both sum exponentials in float64."""
    from nvfp4_runtime import LLM, SamplingParams

    llm = LLM(packed, numerics="w4a4", num_blocks=64, max_num_batched_tokens=100)
    scored = llm.generate([list(w) for w in windows.ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    values = [s.logprob for result in scored for s in result.prompt_logprobs if s is not None]
    (measured,) = evaluate([Side(packed, "w4a4")], windows, llm.tokenizer).students
    assert measured.nll.mean == pytest.approx(-sum(values) / len(values), abs=1e-6)


def test_report_is_json_and_a_table(plain: Path, packed: Path, windows: Windows, tokenizer: Tokenizer) -> None:
    report = evaluate([Side(packed, "w4a16"), Side(packed, "w4a4")], windows, tokenizer, Side(plain), worst=2)
    assert msgspec.json.decode(to_json(report), type=Report) == report
    text = render(report)
    assert "non-overlapping windows of 300" in " ".join(text.split())
    assert "first token is context only" in " ".join(text.split())
    for numerics in ("w4a16", "w4a4"):
        assert sum(line.split()[:1] == [numerics] for line in text.splitlines()) == 1
    for one in report.students:
        assert one.divergence is not None
        assert len(one.divergence.worst) == 2
        assert f"{one.divergence.kl.mean:.4f}" in text
        assert f"{one.perplexity.mean:.2f}" in text


def test_a_window_beyond_the_context_is_refused(packed: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="600 tokens exceeds the context") as caught:
        evaluate([Side(packed)], cut(tokenizer, TEXT, 600, 1), tokenizer)
    assert caught.value.flag == "--window"


def test_numerics_of_a_plain_model_are_refused(plain: Path, windows: Windows, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"no layer of .* is stored as NVFP4"):
        evaluate([Side(plain, "w4a4")], windows, tokenizer)


@pytest.mark.parametrize("two_pass", [False, True])
def test_a_teacher_of_another_vocabulary_is_refused(
    packed: Path, windows: Windows, tokenizer: Tokenizer, tmp_path: Path, two_pass: bool
) -> None:
    other = tiny_llama(tmp_path, vocab_size=336)
    with pytest.raises(ConfigError, match="the teacher has 336 tokens") as caught:
        evaluate([Side(packed)], windows, tokenizer, Side(other), two_pass=two_pass)
    assert caught.value.flag == "--teacher"


def test_tokens_that_the_model_has_not_are_refused(windows: Windows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = tiny_llama(tmp_path, vocab_size=64, bos_token_id=1, eos_token_id=2)
    with pytest.raises(CheckpointError, match="has 64 of them"):
        evaluate([Side(small)], windows, tokenizer)


def test_logits_that_are_not_numbers_are_an_error(windows: Windows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = llama_config()
    tensors = random_tensors(config)
    tensors["model.norm.weight"][3] = math.nan
    broken = write_plain(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match="after token 0 of a window are not finite"):
        evaluate([Side(broken)], windows, tokenizer)
