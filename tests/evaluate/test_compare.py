"""The table of methods: every method is made and measured, and the words under it follow from the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate import compare
from nvfp4_runtime.evaluate.compare import Comparison, Row, check_apart, default_method, first_tokens, main, verdict
from nvfp4_runtime.evaluate.divergence import Interval, percentiles
from nvfp4_runtime.evaluate.document import markdown_table, replace_section
from nvfp4_runtime.evaluate.report import Divergence, Measured
from nvfp4_runtime.quantize.pipeline import METHODS
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.tiny import tiny_llama

TEXT = "".join(f"Sentence {i} of what is evaluated, and nothing that anybody would calibrate on.\n" for i in range(20))
CALIB = "".join(
    f"{i} bottles of something else stand on a wall, and one of them is about to fall.\n" for i in range(20)
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("parent"))


def test_every_method_is_measured_and_the_document_holds_the_table(parent: Path, tmp_path: Path) -> None:
    text, calib, docs, found = (tmp_path / name for name in ("text", "calib", "quality.md", "quality.json"))
    text.write_text(TEXT)
    calib.write_text(CALIB)
    docs.write_text("# Quality\n\n<!-- quality -->\nold\n<!-- end quality -->\n\nend\n")
    arguments = ["--text", str(text), "--calib", str(calib), "--model", str(parent), "--window", "64", "--windows", "3"]
    assert main([*arguments, "--docs", str(docs), "--json", str(found)]) == 0
    written = msgspec.json.decode(found.read_bytes(), type=Comparison)
    assert [(row.method, row.numerics) for row in written.rows] == [(m, n) for m in METHODS for n in ("w4a16", "w4a4")]
    assert written.default_method == default_method()
    assert default_method() in METHODS
    for row in written.rows:
        assert row.measured.numerics == row.numerics
        assert row.measured.divergence is not None
        assert row.measured.divergence.kl.mean == pytest.approx(np.mean(row.measured.divergence.kl_by_window))
        assert row.quantize_seconds > 0
        assert (row.against_max is None) == (row.method == "max")
    document = docs.read_text()
    assert document.startswith("# Quality\n\n<!-- quality -->\n")
    assert document.endswith("<!-- end quality -->\n\nend\n")
    assert "old" not in document
    assert document.count("\n| ") == 2 + 1 + len(written.rows)  # head, rule, parent
    assert written.command in document


def test_a_text_that_was_calibrated_on_is_refused(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT + CALIB[:300])
    calib = tmp_path / "calib"
    calib.write_text(CALIB)
    assert main(["--text", str(text), "--calib", str(calib), "--model", str(parent), "--window", "64"]) == 1
    assert "must not be calibrated on what it is measured on" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="share '"):
        check_apart(["short", CALIB[330:]], TEXT + CALIB)
    check_apart([CALIB], TEXT)


def test_folders_that_are_there_are_taken(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("text", TEXT), ("calib", CALIB)):
        (tmp_path / name).write_text(content)
    work = tmp_path / "work"
    arguments = ["--text", str(tmp_path / "text"), "--calib", str(tmp_path / "calib"), "--model", str(parent)]
    arguments += ["--window", "64", "--methods", "max"]
    assert main([*arguments, "--only-quantize"]) == 1
    assert "needs a folder to stay in" in capsys.readouterr().err
    assert main([*arguments, "--only-quantize", "--work", str(work)]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["max", "max.seconds"]
    (work / "max.seconds").write_text("123.4\n")

    def made_again(*_: object, method: str = "max", **__: object) -> None:
        raise AssertionError(f"{method} was quantised again")

    monkeypatch.setattr(compare, "quantize_folder", made_again)
    assert main([*arguments, "--work", str(work)]) == 0
    assert "| 123 |" in capsys.readouterr().out


def test_calibration_texts_are_cut_to_the_tokens_asked_for(parent: Path) -> None:
    tokenizer = Tokenizer.load(parent)  # a token is a byte
    assert first_tokens(["abc", "defg", "hi"], tokenizer, 5) == ["abc", "de"]
    assert first_tokens(["abc", "defg"], tokenizer, 7) == ["abc", "defg"]


def row(method: str, numerics: str, kl: list[float], base: list[float] | None) -> Row:
    values = np.array(kl)
    nothing = Interval(1.0)
    divergence = Divergence(Interval.over(values, len(kl)), percentiles(values), kl, nothing, nothing, [])
    facts: dict[str, Any] = {"model": "m", "numerics_reason": "", "dtype": "", "kv_dtype": "", "weight_bytes": {}}
    measured = Measured(
        numerics=numerics, kernels=[], nll=nothing, perplexity=nothing, seconds=1.0, tokens_per_second=1.0, **facts
    )
    measured.divergence = divergence
    against = None if base is None else Interval.over(values - np.array(base), len(kl))
    return Row(method, numerics, 1.0, measured, against)


def test_what_did_not_help_is_said_even_of_the_default() -> None:
    base = [0.2, 0.4, 0.3, 0.5]
    better = [value - 0.05 for value in base]  # every window: the difference is sure although the windows scatter
    unsure = [0.1, 0.5, 0.1, 0.6]  # less in the mean, not in every window
    rows = [row("max", "w4a16", base, None), row("a", "w4a16", better, base), row("b", "w4a16", unsure, base)]
    rows += [row("max", "w4a4", base, None), row("a", "w4a4", [value + 0.1 for value in base], base)]
    assert verdict(rows, "a").splitlines() == [
        "- w4a16, best first: a 0.3000, b 0.3250, max 0.3500.",
        "- w4a16, not better than `max` beyond the windows' scatter: b.",
        "- w4a4, best first: max 0.3500, a 0.4500.",
        "- w4a4, not better than `max` beyond the windows' scatter: a (the default).",
    ]


def test_tables_and_places_in_documents(tmp_path: Path) -> None:
    assert markdown_table([("a", "b"), ("1", "2")], left=1) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    path = tmp_path / "doc.md"
    for text in ("", "<!-- quality -->", "<!-- end quality --><!-- quality -->", "<!-- quality -->" * 2):
        path.write_text(text)
        with pytest.raises(ConfigError, match="once each, in this order"):
            replace_section(path, "quality", "x")
        assert path.read_text() == text
    with pytest.raises(ConfigError, match="cannot be read"):
        replace_section(tmp_path / "nowhere", "quality", "x")


def test_the_committed_document_has_its_place() -> None:
    document = Path(compare.__file__).parents[2] / "docs" / "quality.md"
    text = document.read_text()
    assert text.count(f"<!-- {compare.SECTION} -->") == text.count(f"<!-- end {compare.SECTION} -->") == 1
