"""What cannot be done is refused before any work, and a text is read to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.writer import check_place
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.quantize.calibrate import input_scale_of, tokenize
from nvfp4_runtime.quantize.layerwise import WINDOW
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.resume import partial_folder
from nvfp4_runtime.quantize.sensitivity import check_budget
from tests import tiny

LONG = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny.llama_config(dtype="bfloat16")
    return tiny.write_plain(tmp_path / "src", config, tiny.random_tensors(config, dtype=torch.bfloat16))


def edit_tokenizer(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_truncation_and_padding_of_the_tokenizer_s_file_do_not_apply(source):
    (whole,) = tokenize(source, [LONG])
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 99_999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    edit_tokenizer(source, truncation=truncation, padding=padding)
    assert len(whole) > WINDOW
    assert tokenize(source, [LONG]) == [whole]


def test_a_broken_tokenizer_is_a_clear_error(source):
    (source / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        tokenize(source, [LONG])


@pytest.mark.parametrize("text", ["a", "short text", " " * 5000])
def test_a_text_too_short_to_measure_on_is_refused(source, tmp_path, text):
    with pytest.raises(ConfigError, match="expected at least 64"):
        quantize_folder(source, tmp_path / "out", calib_texts=[text], backend="reference", progress=False)
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "words"),
    [(1, "fewer than NVFP4"), (4.49, "fewer than NVFP4"), (float("nan"), "fewer than NVFP4"), (16, "nothing needs")],
)
def test_budgets_outside_what_formats_take_are_refused(budget, words):
    with pytest.raises(ConfigError, match=words):
        check_budget(budget)


def test_the_result_stands_where_a_symbolic_link_leads(source, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there" / "model", target_is_directory=True)
    quantize_folder(source, tmp_path / "link", method="max", backend="reference", progress=False)
    assert (tmp_path / "there" / "model" / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_places_that_cannot_be_are_refused_before_work(source, tmp_path):
    with pytest.raises(ConfigError, match="lies inside"):
        check_place(source / "out", source)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ConfigError, match="circle"):
        check_place(tmp_path / "circle", source)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        check_place(tmp_path / "file", source)
    with pytest.raises(NotADirectoryError):
        check_place(tmp_path / "file" / "out", source)


def test_flags_without_use_are_refused(source, tmp_path):
    for flags in ({"calib_windows": 4}, {"numerics": "w4a4"}):
        with pytest.raises(ConfigError, match="has no use for it"):
            quantize_folder(source, tmp_path / "out", method="mse", backend="reference", progress=False, **flags)


def test_an_input_that_was_always_zero_has_scale_one(caplog):
    assert input_scale_of(0.0, ["model.layers.0.mlp.down_proj"]) == 1.0
    assert "is zero over the whole text" in caplog.text
    assert input_scale_of(2688.0, ["x"]) == 1.0
