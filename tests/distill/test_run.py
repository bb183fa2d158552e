"""`nvfp4 distill` from flags to folder: it closes distance, resumes bit for bit, and refuses what cannot be."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.distill import run as module
from nvfp4_runtime.distill import synthesize as synthesis
from nvfp4_runtime.distill.blockwise import Blockwise
from nvfp4_runtime.distill.loss import LOSSES
from nvfp4_runtime.distill.run import distill
from nvfp4_runtime.distill.student import BLOCK_SCALES
from nvfp4_runtime.distill.trainer import Interrupted, Schedule
from nvfp4_runtime.distill.wishes import DTYPES, MODES
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate.evaluate import evaluate
from nvfp4_runtime.evaluate.scorer import Side
from nvfp4_runtime.evaluate.windows import cut
from nvfp4_runtime.llm import LLM
from nvfp4_runtime.text.tokenizer import Tokenizer
from server import cli
from server.commands import distill as command
from tests.distill.conftest import SCHEDULE, TEXT, killed_after


def engine_kl(teacher: Path, folder: Path) -> float:
    """KL to the teacher in W4A4 as `nvfp4 eval` measures it."""
    windows = cut(Tokenizer.load(teacher), TEXT, 100, 3)
    report = evaluate([Side(folder, numerics="w4a4")], windows, Tokenizer.load(teacher), Side(teacher))
    divergence = report.students[0].divergence
    assert divergence is not None
    return divergence.kl.mean


def test_distillation_brings_the_engine_nearer_to_the_teacher(teacher, wishes, tmp_path):
    done = distill(teacher, tmp_path / "out", wishes)
    assert done.result is not None
    assert done.result.best["kl"] < 0.8 * done.result.first["kl"]
    assert engine_kl(teacher, tmp_path / "out") < engine_kl(teacher, wishes.student)
    with (done.work / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [int(row["step"]) for row in log] == list(range(1, 25))
    assert float(log[0]["lr"]) == pytest.approx(1.5e-3)
    assert float(log[-1]["lr"]) < 4e-4
    assert not (done.work / "checkpoint").exists()


def test_qat_leaves_the_teacher_and_says_so(teacher, wishes, tmp_path, caplog):
    qad = distill(teacher, tmp_path / "qad", wishes)
    ce = replace(wishes, schedule=replace(SCHEDULE, loss="ce"))
    with caplog.at_level("WARNING"):
        qat = distill(teacher, tmp_path / "qat", ce)
    assert "undoes post-training" in caplog.text
    assert qat.result.last["ce"] < qad.result.last["ce"]
    assert qat.result.last["kl"] > 5 * qad.result.last["kl"]


def test_a_killed_run_goes_on_to_the_same_bits(teacher, wishes, tmp_path):
    whole = distill(teacher, tmp_path / "whole", wishes)
    with killed_after(10), pytest.raises(Interrupted, match="stopped after step 11 of 24"):
        distill(teacher, tmp_path / "part", wishes)
    assert not (tmp_path / "part").exists()
    resumed = distill(teacher, tmp_path / "part", wishes)
    assert resumed.result.last["kl"] == whole.result.last["kl"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[n].reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8)) for n in one)
    logs = [(tmp_path / f"{name}.training" / "log.csv").read_text().splitlines() for name in ("whole", "part")]
    assert [line.rsplit(",", 1)[0] for line in logs[0]] == [line.rsplit(",", 1)[0] for line in logs[1]]


def test_the_best_step_of_qat_is_by_its_labels(teacher, wishes, tmp_path):
    """It leads away from the teacher, so that by KL the best would be the start."""
    schedule = replace(SCHEDULE, loss="ce", lr=3e-3)
    result = distill(teacher, tmp_path / "out", replace(wishes, schedule=schedule)).result
    assert result is not None
    assert result.best["ce"] < result.first["ce"]
    assert result.best["kl"] > result.first["kl"]


def test_another_run_does_not_go_on_with_this_one(teacher, wishes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "export_student", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        distill(teacher, tmp_path / "out", replace(wishes, tokens=192))
    with pytest.raises(ConfigError, match="holds a run with other schedule"):
        distill(teacher, tmp_path / "out", wishes)


@pytest.mark.parametrize("mode", ["blockwise", "scales"])
def test_other_modes_close_some_of_the_distance_too(teacher, wishes, tmp_path, mode):
    schedule = replace(SCHEDULE, lr=1e-3)
    done = distill(teacher, tmp_path / "out", replace(wishes, mode=mode, schedule=schedule))
    if mode == "blockwise":
        assert [block.layer for block in done.blocks] == [0, 1]
        assert all(block.after < block.before for block in done.blocks)
    else:
        assert done.result.best["kl"] < done.result.first["kl"]
    before, after = (engine_kl(teacher, folder) for folder in (wishes.student, tmp_path / "out"))
    assert after < before


def test_a_killed_blockwise_run_keeps_its_finished_layers(teacher, wishes, tmp_path, monkeypatch):
    wishes = replace(wishes, mode="blockwise")
    distill(teacher, tmp_path / "whole", wishes)
    original = Blockwise._train

    def killed(self, layer_id, *rest):
        if layer_id == 1:
            raise KeyboardInterrupt
        return original(self, layer_id, *rest)

    monkeypatch.setattr(Blockwise, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, tmp_path / "part", wishes)
    trained = []

    def counted(self, layer_id, *rest):
        trained.append(layer_id)
        return original(self, layer_id, *rest)

    monkeypatch.setattr(Blockwise, "_train", counted)
    distill(teacher, tmp_path / "part", wishes)
    assert trained == [1]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[n].reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8)) for n in one)


def test_text_sampled_from_the_teacher_is_trained_on(teacher, wishes, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say something.\nSay more.\n")
    small = replace(wishes, data=str(prompts), synthesize=6, held_rows=2, tokens=192, act="w4a16")
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(synthesis, "LLM", lambda folder, **options: given.append(options) or LLM(folder, **options))
    done = distill(teacher, tmp_path / "out", replace(small, threads=torch.get_num_threads()))
    assert [options["threads"] for options in given] == [torch.get_num_threads()]
    lines = [json.loads(line) for line in (done.work / "synthesized.jsonl").read_text().splitlines()]
    asked = [line["prompt"].splitlines()[1].removesuffix("<|im_end|>") for line in lines]  # as the template puts it
    assert asked == ["Say something.", "Say more."] * 3
    assert len({line["completion"] for line in lines}) == 6


def test_a_completion_that_holds_line_separators_is_one_completion(teacher, tmp_path):
    out = tmp_path / "synthesized.jsonl"
    first = json.dumps({"prompt": "a", "completion": "b\u2028c\u2028d"}, ensure_ascii=False)
    out.write_text(first + "\n", encoding="utf-8")
    synthesis.synthesize(teacher, 2, out, prompts=["Say more."], max_tokens=4)
    kept, made, end = out.read_text(encoding="utf-8").split("\n")
    assert kept == first
    assert json.loads(made).keys() == {"prompt", "completion"}
    assert end == ""


def test_a_student_is_made_by_awq_where_none_is_given(teacher, wishes, tmp_path):
    done = distill(teacher, tmp_path / "out", replace(wishes, student=None, tokens=192))
    assert (
        json.loads((done.work / "start" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "NVFP4"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, r"nothing to train on.*--synthesize"),
        ({"seq": 1}, "expected at least 2, found 1"),
        ({"tokens": 0}, "expected at least 1, found 0"),
        ({"batch_tokens": 8}, "expected at least 48, found 8"),
        ({"held_rows": 90}, "too few to hold 90 out"),
        ({"seq": 9000, "batch_tokens": 9000, "micro_tokens": 9000}, "longer than the 512 positions"),
        ({"data": "nowhere.json"}, "cannot be read"),
        ({"threads": 0}, "expected at least 1, found 0"),
        ({"device": "meta"}, "no device to train on"),
        ({"schedule": Schedule(lr=math.inf)}, "positive learning rate, found inf"),
        ({"schedule": Schedule(clip=-1.0)}, "positive norm"),
        ({"schedule": Schedule(save_minutes=math.nan)}, "positive number of minutes"),
        ({"schedule": Schedule(warmup=-1)}, "expected at least 0, found -1"),
        ({"schedule": Schedule(eval_every=0)}, "expected at least 1, found 0"),
        ({"schedule": Schedule(stop=0)}, "expected at least 1, found 0"),
        ({"schedule": Schedule(seed=2**63)}, "expected 0 to 4294967295"),
        ({"mode": "blockwise", "schedule": Schedule(stop=3)}, "takes every step"),
        ({"mode": "blockwise", "schedule": Schedule(checkpointing=True)}, "holds one block"),
        ({"device": "cuda:9"}, "no CUDA device"),
        ({"device": "abacus"}, "unknown device"),
        ({"data": "nowhere.txt"}, "cannot be read"),
        ({"schedule": Schedule(lr=0)}, "positive learning rate"),
        ({"mode": "blockwise", "schedule": Schedule(loss="ce")}, "a loss of its own"),
    ],
)
def test_impossible_wishes_are_refused_before_any_work(teacher, wishes, tmp_path, change, message):
    if change.get("device") == "cuda:9" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA devices")
    with pytest.raises(ConfigError, match=message):
        distill(teacher, tmp_path / "out", replace(wishes, **change))
    assert not (tmp_path / "out").exists()


def test_the_command_runs_a_training_and_tells_what_it_closed(teacher, text, plainly, tmp_path, capsys):
    flags = ["--data", str(text), "--student", str(plainly), "--seq", "48", "--tokens", "384", "--batch-tokens", "192"]
    code = cli.main(["distill", str(teacher), str(tmp_path / "out"), *flags, "--held-rows", "4", "--lr", "1e-3"])
    out = capsys.readouterr().out
    assert code == 0
    assert "best at step" in out
    assert "held-out KL" in out
    assert cli.main(["distill", str(teacher), str(tmp_path / "out2")]) == 1
    assert "nothing to train on" in capsys.readouterr().err


def test_the_flags_list_what_there_is():
    assert command.LOSSES == LOSSES
    assert command.MODES == MODES
    assert command.BLOCK_SCALES == BLOCK_SCALES
    assert tuple(DTYPES) == command.DTYPES


def test_computing_in_float32_teaches_as_much(teacher, wishes, tmp_path):
    done = distill(teacher, tmp_path / "out", replace(wishes, dtype="float32"))
    assert done.result is not None
    assert done.result.best["kl"] < 0.8 * done.result.first["kl"]
    assert engine_kl(teacher, tmp_path / "out") < engine_kl(teacher, wishes.student)
    with pytest.raises(ConfigError, match="unknown value 'float64'; expected one of bfloat16, float32"):
        distill(teacher, tmp_path / "other", replace(wishes, dtype="float64"))


def test_a_finished_distillation_is_gone_on_with_from_its_float32_weights(teacher, wishes, tmp_path, monkeypatch):
    first = distill(teacher, tmp_path / "first", wishes)
    more = replace(wishes, student=first.out, tokens=192)
    second = distill(teacher, tmp_path / "second", more)
    assert second.result.first["kl"] == pytest.approx(first.result.best["kl"], rel=1e-6)
    masters, resumed = (load_file(run.work / "best.safetensors") for run in (first, second))
    assert max(float((masters[n] - resumed[n]).abs().max()) for n in masters) <= 2 * SCHEDULE.lr
    with pytest.raises(ConfigError, match="made with another --train or --mode"):
        distill(teacher, tmp_path / "third", replace(more, mode="scales"))


def test_the_preset_names_teacher_place_and_flags_and_flags_after_it_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def instead(teacher, out, wishes):
        asked.append((teacher, out, wishes))
        raise ConfigError("asked")

    monkeypatch.setattr(module, "distill", instead)
    assert cli.main(["distill", "--preset", "default", "--tokens", "4096"]) == 1
    ((teacher, out, wishes),) = asked
    assert teacher == "default"
    assert out.startswith(str(tmp_path))
    assert out.endswith("NVFP4-QAD")
    assert (wishes.synthesize, wishes.data, wishes.tokens, wishes.schedule.lr) == (512, None, 4096, 1.5e-4)
    assert cli.main(["distill", "--data", "text.txt"]) == 1
    assert "expected TEACHER and OUT, or --preset default" in capsys.readouterr().err
    assert cli.main(["distill", str(tmp_path), "--preset", "default"]) == 1  # not into the default model's place
    assert "expected TEACHER and OUT" in capsys.readouterr().err
    assert cli.main(["distill", "--tokens", "4096", "--preset", "default"]) == 1
    assert "expected before --tokens" in capsys.readouterr().err
