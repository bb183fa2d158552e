"""`nvfp4 eval`: flags, exit codes, and both kinds of output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvfp4_runtime.errors import ConfigError
from server.cli import main
from server.commands.evaluate import parse_numerics
from tests.tiny import tiny_llama, tiny_nvfp4_llama


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_nvfp4_llama(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A short text, of which every byte is a token. " * 20)
    return path


def test_json_has_a_row_per_numerics(
    packed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_llama(tmp_path)
    flags = ["--window", "64", "--windows", "2", "--numerics", "w4a16, w4a4,w4a8", "--kv-cache-dtype", "fp8", "--json"]
    assert main(["eval", str(packed), "--text", str(text), "--teacher", str(teacher), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["numerics"] for row in report["students"]] == ["w4a16", "w4a4", "w4a8"]
    assert {row["kv_dtype"] for row in report["students"]} == {"fp8"}
    assert report["teacher"]["numerics"] == "float32"
    assert report["num_scored"] == 2 * 63
    assert all(row["divergence"]["kl"]["mean"] > 0 for row in report["students"])


def test_table_goes_to_stdout_and_progress_to_stderr(
    packed: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(packed), "--text", str(text), "--window", "64", "--windows", "2"]) == 0
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert "evaluate" not in shown.out
    assert "126/126" in shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--numerics", "w4a16,w8a8"], "unknown numerics 'w8a8'"),
        (["--numerics", ""], "unknown numerics ''"),
        (["--windows", "99"], "99 were asked for"),
        (["--window", "5000"], "too few for one window of 5000"),
        (["--worst", "-1"], "expected a count"),
        (["--teacher", "/nowhere"], "there is no model folder /nowhere"),
        (["--kv-cache-dtype", "int8"], "expected auto, bf16, fp8"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_1(
    packed: Path, text: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(packed), "--text", str(text), "--window", "64", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nvfp4: ")
    assert error.count("\n") == 1


def test_text_and_model_must_be_there(packed: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(packed)]) == 1
    assert "--text" in capsys.readouterr().err
    assert main(["eval", str(packed), "--text", "/nowhere"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["eval", "/nowhere", "--text", str(text)]) == 1
    assert "there is no model folder /nowhere" in capsys.readouterr().err


def test_a_broken_checkpoint_is_a_load_error(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_nvfp4_llama(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["eval", str(folder), "--text", str(text), "--window", "64"]) == 2
    assert "truncated" in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(
    packed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_llama(tmp_path)
    state = json.loads((teacher / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (teacher / "tokenizer.json").write_text(json.dumps(state))
    assert main(["eval", str(packed), "--text", str(text), "--window", "64", "--teacher", str(teacher)]) == 1
    assert "cut the text differently" in capsys.readouterr().err


def test_numerics_are_a_list_without_repetition() -> None:
    assert parse_numerics("w4a4, w4a16,w4a4") == ["w4a4", "w4a16"]
    with pytest.raises(ConfigError):
        parse_numerics("w4a4;w4a16")
