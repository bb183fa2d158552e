"""`nvfp4 inspect` at the command line: exit codes, JSON, and nothing but JSON on standard output."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.report import SCHEMA, Report
from nvfp4_runtime.checkpoint.writer import ShardWriter
from nvfp4_runtime.quantize import default_model
from server.cli import main
from server.commands.inspect import _bars
from tests.checkpoint.doctor.patients import DOWN, UP, edit, sound
from tests.conftest import REPOSITORY


def test_exit_codes_are_0_sound_1_findings_2_unreadable(tmp_path, capsys):
    folder, parent = sound(tmp_path)
    assert main(["inspect", str(folder), "--parent", str(parent)]) == 0
    assert "sound" in capsys.readouterr().out
    edit(folder, lambda tensors: tensors.pop(f"{UP}.input_scale"))
    assert main(["inspect", str(folder)]) == 1
    assert "input-scale-missing" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--repair", str(tmp_path / "out")]) == 0
    assert "the repaired copy is sound" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    (folder / "model.safetensors").write_bytes(b"no")
    assert main(["inspect", str(folder)]) == 2
    assert "truncated" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2


def test_json_is_the_report_and_round_trips(tmp_path, capsys):
    folder, parent = sound(tmp_path, shards=2)
    assert (
        main(["inspect", str(folder), "--json", "--parent", str(parent), "--memory", "1MiB", "--memory", "24GiB"]) == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    report = msgspec.json.decode(captured.out, type=Report)
    assert report.schema == SCHEMA
    assert [fit.memory_bytes for fit in report.fits] == [1 << 20, 24 << 30]
    again = inspect(folder, parent, memories=(1 << 20, 24 << 30))
    assert json.loads(captured.out) | {"seconds": 0} == json.loads(msgspec.json.encode(again)) | {"seconds": 0}


def test_the_schema_has_the_fields_programs_rely_on(tmp_path):
    folder, _ = sound(tmp_path)
    value = json.loads(msgspec.json.encode(inspect(folder)))
    assert set(value) == {
        *("schema", "path", "architecture", "files", "method", "algo", "kv_algo", "producer", "exclude", "layers"),
        *("groups", "parameters", "bytes", "bytes_by_format", "ratio_to_bf16", "kv_dtype", "kv_bytes_per_token"),
        *("fits", "findings", "parent", "repair", "seconds"),
    }
    assert set(value["layers"][0]) == {
        *("name", "stored", "shape", "parameters", "bytes", "bits_per_weight", "excluded", "why", "scales"),
        *("sqnr_db", "relative_error"),
    }
    assert set(value["findings"][0]) == {"id", "severity", "message", "remedy", "layers"}


def test_a_senseless_memory_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--memory", "much"]) == 1
    assert "--memory" in capsys.readouterr().err


def test_help_states_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "0 sound, 1 warnings or errors were found, 2 unreadable" in capsys.readouterr().out


def test_progress_tells_of_all_bytes_once(tmp_path):
    folder, parent = sound(tmp_path)
    told = {}

    def progress(what, total):
        told[what] = [total]
        return told[what].append

    report = inspect(folder, parent, progress=progress)
    total, *steps = told["reading"]
    assert len(steps) > len(report.layers)
    assert 0.95 * total < sum(steps) <= total  # scalars are not counted


def test_progress_bars_go_to_a_terminal_only(capsys):
    with _bars(show=False) as start:
        start("reading", 10)(10)
    assert capsys.readouterr().err == ""
    with _bars(show=True) as start:
        advance = start("reading", 10)
        advance(4)
        advance(40)
    assert "reading" in capsys.readouterr().err


def test_control_characters_of_names_never_reach_the_terminal(tmp_path, capsys):
    folder, _ = sound(tmp_path)
    name = "model.layers.0.\x1b[31mEVIL\n\u202e.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(64, 64, dtype=torch.bfloat16)}))
    assert main(["inspect", str(folder), "--layers"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b[31mEVIL\\n\\u202e" in out
    assert main(["inspect", str(tmp_path / "a\x1b[31m\nb")]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "a\\x1b[31m\\nb" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("inside", "parent"), [("nvfp4", False), ("parent", True)])
def test_a_repaired_copy_inside_what_is_read_is_refused(tmp_path, capsys, inside, parent):
    folder, plain = sound(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--parent", str(plain)] if parent else []
    assert main(["inspect", str(folder), *arguments, "--repair", str(tmp_path / inside / "out")]) == 1
    assert f"lies inside {tmp_path / inside}, which is read" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parent_that_is_not_finite_is_a_finding(tmp_path, capsys, bad):
    folder, parent = sound(tmp_path)
    edit(parent, lambda tensors: tensors[f"{UP}.weight"].view(-1)[:1].fill_(bad))
    assert main(["inspect", str(folder), "--parent", str(parent)]) == 1
    out = capsys.readouterr().out
    assert "parent-nonfinite: 1 layer(s)" in out
    assert "compared, not finite over all" in out
    assert f"not finite  relative error not finite  {UP}" in out
    assert "999" not in out
    assert main(["inspect", str(folder), "--parent", str(parent), "--json"]) == 1
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    found = [(layer.sqnr_db, layer.relative_error) for layer in report.layers if layer.name == UP]
    assert found == [(-999, None)]  # sqnr_db as docs/inspect.md promises of schema 1


def test_weights_whose_distance_overflows_are_far_from_the_parent(tmp_path, capsys):
    folder, parent = sound(tmp_path)
    edit(folder, lambda tensors: tensors[f"{DOWN}.weight_scale_2"].fill_(1e22))
    assert main(["inspect", str(folder), "--parent", str(parent)]) == 1
    out = capsys.readouterr().out
    assert "far-from-parent: 1 layer(s)" in out
    assert f"not finite  relative error not finite  {DOWN}" in out


@pytest.mark.parametrize("repair", ["file/out", "n" * 300])
def test_an_out_that_cannot_be_made_is_a_clear_error_with_2(tmp_path, capsys, repair):
    folder, _ = sound(tmp_path)
    (tmp_path / "file").write_text("x")
    assert main(["inspect", str(folder), "--repair", str(tmp_path / repair)]) == 2
    assert "nvfp4: cannot go on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nvfp4", "parent"]


def test_a_path_too_long_is_a_clear_error_with_2(capsys):
    assert main(["inspect", "n" * 300]) == 2
    assert "nvfp4: " in capsys.readouterr().err


def test_a_disk_that_fills_up_during_repair_leaves_nothing(tmp_path, capsys, monkeypatch):
    folder, _ = sound(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    assert main(["inspect", str(folder), "--repair", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvfp4", "parent"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_that_cannot_be_written_is_2_without_a_traceback(tmp_path):
    folder, _ = sound(tmp_path)
    command = [sys.executable, "-m", "server.cli", "inspect", str(folder)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_left_is_2_without_a_traceback(tmp_path):
    folder, _ = sound(tmp_path)
    command = [sys.executable, "-m", "server.cli", "inspect", str(folder), "--json"]
    running = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    _, err = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "Broken pipe" in err
    assert len(err.splitlines()) == 1


def test_a_copy_that_is_not_sound_keeps_its_name_and_is_called_so(tmp_path, capsys):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert main(["inspect", str(folder), "--repair", str(tmp_path / "out")]) == 1
    assert "the repaired copy is not sound" in (out := capsys.readouterr().out)
    assert "do not take it for a sound one" in out
    assert main(["inspect", str(tmp_path / "out")]) == 1


def test_a_parent_that_says_nothing_is_no_silence(tmp_path, capsys):
    folder, _ = sound(tmp_path)
    assert main(["inspect", str(folder), "--parent", str(folder)]) == 1
    assert "none could, so the parent says nothing" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(folder), "--parent", str(tmp_path / "nope")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_default_model_goes_by_its_names(tmp_path, monkeypatch, capsys):
    folder, parent = sound(tmp_path)
    monkeypatch.setattr(default_model, "ensure_default_model", lambda: folder)
    monkeypatch.setattr(default_model, "default_bf16", lambda: parent)
    assert main(["inspect", "default", "--parent", "default-bf16"]) == 0
    assert f"against {parent}" in capsys.readouterr().out
    assert main(["inspect", "default-bf16"]) == 0


def test_an_empty_path_is_not_the_current_folder(capsys):
    assert main(["inspect", ""]) == 1
    assert "empty" in capsys.readouterr().err
