"""Sources and folders with a fault each: said in one sentence, and nothing half-made looks whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.quantize import resume
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.resume import JOURNAL, partial_folder
from tests import tiny

CONFIG = tiny.llama_config(dtype="bfloat16")
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 15]
UP = "model.layers.0.mlp.up_proj.weight"


def write(folder: Path, change: dict[str, torch.Tensor] | None = None) -> Path:
    tensors = tiny.random_tensors(CONFIG, dtype=torch.bfloat16)
    return tiny.write_plain(folder, CONFIG, tensors | (change or {}))


def up() -> torch.Tensor:
    return tiny.random_tensors(CONFIG, dtype=torch.bfloat16)[UP]


@pytest.mark.parametrize("options", [{"method": "awq"}, {"method": "gptq"}, {"bits_budget": 6.0}])
def test_a_weight_that_is_infinite_is_named_and_leaves_nothing(tmp_path, options):
    bad = up()
    bad[0, 0] = torch.inf
    source = write(tmp_path / "src", {UP: bad})
    with pytest.raises(CheckpointError, match=rf"{UP} in model\.safetensors holds NaN or Inf"):
        quantize_folder(source, tmp_path / "out", calib_texts=TEXTS, progress=False, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


@pytest.mark.parametrize("method", ["mse", "awq+gptq"])
def test_a_layer_pruned_to_zero_is_calibrated_with_a_warning(tmp_path, method, caplog):
    source = write(tmp_path / "src", {UP: torch.zeros_like(up())})
    report = quantize_folder(source, tmp_path / "out", method=method, calib_texts=TEXTS, progress=False)
    assert report.algo == "NVFP4"
    assert "the input of model.layers.0.mlp.down_proj is zero over the whole text" in caplog.text


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_a_tokenizer_of_another_model_is_said(tmp_path, method):
    source = write(tmp_path / "src", {"model.embed_tokens.weight": torch.zeros(64, CONFIG["hidden_size"]).bfloat16()})
    path = source / "config.json"
    path.write_text(path.read_text().replace(f'"vocab_size": {CONFIG["vocab_size"]}', '"vocab_size": 64'))
    with pytest.raises(CheckpointError, match=r"and .* has 64 of them: its tokenizer\.json belongs to another model"):
        quantize_folder(source, tmp_path / "out", method=method, calib_texts=TEXTS, progress=False)


def test_a_matrix_without_rows_stays_as_it_is_with_a_note(tmp_path):
    source = write(tmp_path / "src", {UP: torch.zeros(0, CONFIG["hidden_size"]).bfloat16()})
    report = quantize_folder(source, tmp_path / "out", progress=False)
    assert any("holds no weight" in note for note in report.notes)


def test_a_folder_that_cannot_take_its_place_is_still_marked_as_in_the_making(tmp_path, monkeypatch):
    source, out = write(tmp_path / "src"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(NotADirectoryError(20, "Not a directory")))
        with pytest.raises(NotADirectoryError):
            quantize_folder(source, out, progress=False)
    assert (partial_folder(out) / JOURNAL).is_file()
    quantize_folder(source, out, progress=False)
    assert not partial_folder(out).exists()
    assert not (out / JOURNAL).exists()


def test_a_journal_that_is_no_text_starts_anew_and_a_file_in_its_place_is_refused(tmp_path):
    source, out = write(tmp_path / "src"), tmp_path / "out"
    partial_folder(out).write_text("x")
    with pytest.raises(ConfigError, match="is no folder"):
        quantize_folder(source, out, progress=False)
    partial_folder(out).unlink()
    partial_folder(out).mkdir()
    (partial_folder(out) / JOURNAL).write_bytes(b"\xff\xfe\n")
    quantize_folder(source, out, progress=False)
    assert (out / "config.json").is_file()


def test_what_differs_from_an_earlier_run_is_told_in_few_words():
    old = {"recipe": {"plain": ["a", "b"], "formats": {"x": "nvfp4", "y": "fp8"}, "text": None}}
    new = {"recipe": {"plain": ["a"], "formats": {"x": "fp8", "y": "nvfp4"}, "text": 7}}
    said = resume._difference(old, new, ["recipe"])
    assert said == "formats of x: nvfp4 there, fp8 now and 1 more; plain: b only there; text: none there, 7 now"
