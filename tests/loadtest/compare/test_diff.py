"""What became worse fails, what became better or only scatters does not, and what is gone is said."""

from __future__ import annotations

import pytest

from loadtest.__main__ import main
from loadtest.compare.diff import changes, missing, parse_share
from loadtest.compare.report import write_report
from tests.loadtest.compare.made import report, run


def made(*paces: float, side: str = "a"):
    return report([run(side, pace, i) for i, pace in enumerate(paces)])


def worse(old, new, limit=0.05):
    return {each.metric for each in changes(old, new) if each.fails(limit)}


def test_slower_beyond_the_limit_fails():
    assert worse(made(0.010, 0.0101, 0.0102), made(0.012, 0.0121, 0.0122)) == {"gap_p95", "e2e_p95"}


def test_within_the_limit_or_better_passes():
    assert worse(made(0.010, 0.0101, 0.0102), made(0.0103, 0.0104, 0.0105)) == set()
    assert worse(made(0.012, 0.0121, 0.0122), made(0.010, 0.0101, 0.0102)) == set()


def test_a_difference_within_the_scatter_passes():
    assert worse(made(0.010, 0.011, 0.016), made(0.012, 0.013, 0.014)) == set()


def test_a_cell_that_is_gone_is_named():
    old = report([run("a", 0.01, 0), run("b", 0.01, 1)])
    assert missing(old, made(0.01)) == ["b, chat, 4 users"]
    with pytest.raises(ValueError, match="no side and load in common"):
        changes(made(0.01), made(0.01, side="c"))


def test_the_command_exits_with_1_only_where_something_became_worse(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_report(made(0.010, 0.0101, 0.0102), old)
    write_report(made(0.012, 0.0121, 0.0122), new)
    assert main(["diff", str(old), str(new), "--fail-on", "5%"]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert main(["diff", str(old), str(new), "--fail-on", "30%"]) == 0
    assert main(["diff", str(new), str(old)]) == 0
    old.write_text("{}")
    assert main(["diff", str(old), str(new)]) == 2
    assert "not a report of" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.1", 0.1), ("0%", 0.0)])
def test_shares_are_read(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["five", "-1%", "%", "1200%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="expected a share"):
        parse_share(text)
