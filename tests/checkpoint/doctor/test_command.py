"""`nvfp4 inspect` at the command line: exit codes, JSON, and nothing but JSON on standard output."""

from __future__ import annotations

import json

import msgspec
import pytest

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.report import SCHEMA, Report
from server.cli import main
from server.commands.inspect import _bars
from tests.checkpoint.doctor.patients import UP, edit, sound


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
