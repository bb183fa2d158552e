"""What `nvfp4 distill` refuses to go on with, and folders and files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.distill import state
from nvfp4_runtime.distill import synthesize as synthesis
from nvfp4_runtime.distill.run import distill
from nvfp4_runtime.distill.trainer import Interrupted
from nvfp4_runtime.errors import (
    CheckpointError,
    ConfigError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
)
from tests.distill.conftest import SCHEDULE, TEXT, killed_after


def copy_of(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("what", ["teacher", "held", "act", "synthesize", "data"])
def test_a_stopped_run_goes_on_with_nothing_else(teacher, wishes, text, tmp_path, what):
    wishes = replace(wishes, held=str(text), act="w4a16", student=None)
    distill(teacher, tmp_path / "out", replace(wishes, schedule=replace(SCHEDULE, stop=1)))
    shutil.rmtree(tmp_path / "out")
    other = tmp_path / "held.txt"
    other.write_text(TEXT[::-1])
    changes = {what: {what: str(other)}} | {"act": {"act": "w4a4"}, "synthesize": {"synthesize": 2}, "teacher": {}}
    named = shutil.copytree(teacher, tmp_path / "teacher2") if what == "teacher" else teacher
    with pytest.raises(ConfigError, match=f"holds a run with other {what}"):
        distill(named, tmp_path / "out", replace(wishes, **changes[what]))


def test_a_run_may_be_stopped_where_it_is_and_gone_on_with_but_not_earlier(teacher, wishes, tmp_path):
    whole = distill(teacher, tmp_path / "whole", wishes)

    def stop(step):
        return replace(wishes, schedule=replace(SCHEDULE, stop=step))

    first = distill(teacher, tmp_path / "out", stop(8))
    assert first.result.last["step"] == 8
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="after step 8 already; expected at least that, found 3"):
        distill(teacher, tmp_path / "out", stop(3))
    assert distill(teacher, tmp_path / "out", stop(8)).result.last == first.result.last
    shutil.rmtree(tmp_path / "out")
    assert distill(teacher, tmp_path / "out", wishes).result.last["kl"] == whole.result.last["kl"]


def test_a_run_killed_between_measurements_and_then_stopped_there_is_measured(teacher, wishes, tmp_path):
    with killed_after(3), pytest.raises(Interrupted, match="stopped after step 4"):
        distill(teacher, tmp_path / "out", wishes)
    done = distill(teacher, tmp_path / "out", replace(wishes, schedule=replace(SCHEDULE, stop=4)))
    assert done.result.last["step"] == 4
    assert done.result.last["kl"] != done.result.first["kl"]


def test_a_refused_start_claims_no_folder(teacher, wishes, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        distill(teacher, tmp_path / "out", replace(wishes, data="nowhere.txt"))
    distill(teacher, tmp_path / "out", replace(wishes, tokens=192))


def test_two_runs_do_not_train_in_one_folder(teacher, wishes, tmp_path):
    work = tmp_path / "out.training"
    work.mkdir()
    with state.locked(work), pytest.raises(ConfigError, match="another run trains in"):
        distill(teacher, tmp_path / "out", wishes)


def test_a_diverged_training_ends_and_says_so(teacher, wishes, tmp_path):
    with pytest.raises(ConfigError, match=r"is nan after step .*diverges"):
        distill(teacher, tmp_path / "out", replace(wishes, schedule=replace(SCHEDULE, lr=1e30, warmup=0)))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_lacks_weights_or_is_quantised_is_refused(teacher, wishes, tmp_path):
    lacking = copy_of(teacher, tmp_path / "lacking", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor.*layers\.0\.mlp\.up_proj"):
        distill(lacking, tmp_path / "out", wishes)
    cut = shutil.copytree(teacher, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        distill(cut, tmp_path / "out2", wishes)
    with pytest.raises(ConfigError, match="is quantised; expected the plain model"):
        distill(wishes.student, tmp_path / "out3", wishes)


def test_a_student_with_other_tensors_than_the_teacher_s_is_refused(teacher, wishes, tmp_path):
    norm = "model.layers.0.input_layernorm.weight"
    changes = {
        "lacks": (MissingTensorError, lambda tensors: tensors.pop(norm)),
        "surplus": (UnexpectedTensorError, lambda t: t.update({"model.layers.9.x.weight": torch.ones(2)})),
        "shape": (TensorShapeError, lambda t: t.update({norm: torch.ones(63)})),
    }
    for name, (error, change) in changes.items():
        student = copy_of(wishes.student, tmp_path / name, change)
        with pytest.raises(error):
            distill(teacher, tmp_path / f"out-{name}", replace(wishes, student=student))


def test_prompts_that_are_chats_are_asked_up_to_the_user_s_last_words(tmp_path):
    path = tmp_path / "prompts.jsonl"
    system, user = {"role": "system", "content": "Be terse."}, {"role": "user", "content": "Really?"}
    answer = {"role": "assistant", "content": "Yes."}
    path.write_text("\n".join(["", json.dumps({"messages": [system, user, answer]}), '{"prompt": "x"}', '"y"']))
    assert synthesis.read_prompts(str(path)) == [[system, user], "x", "y"]
    for wrong in (
        "null",
        '{"messages": ["x"]}',
        '{"messages": {"a": 1}}',
        '{"prompt": ""}',
        json.dumps({"messages": [system]}),
    ):
        path.write_text(f"\n\n{wrong}\n")
        with pytest.raises(ConfigError, match=r"prompts\.jsonl:3: expected"):
            synthesis.read_prompts(str(path))


def test_a_prompt_longer_than_the_teacher_is_named(teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"a prompt has \d+ tokens, and the teacher holds 512"):
        synthesis.synthesize(teacher, 1, tmp_path / "out.jsonl", prompts=["Why? " * 200])
