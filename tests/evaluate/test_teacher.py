"""A teacher's answers kept on disk: the same bits, a bounded size, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate.divergence import Rows
from nvfp4_runtime.evaluate.teacher import StoredTeacher

LOGITS = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
TOKENS = tuple(range(11))


def test_rows_come_back_in_order_in_pieces_of_any_size(tmp_path: Path) -> None:
    given = Rows.of_logits(LOGITS, TOKENS[1:])
    stored = StoredTeacher(10, 32, tmp_path)
    for start, stop in ((0, 3), (3, 10)):
        stored.store(Rows.of_logits(LOGITS[start:stop], TOKENS[start + 1 : stop + 1]))
    for _ in range(2):
        stored.rewind()
        found = [stored.rows(TOKENS, start, stop) for start, stop in ((0, 5), (5, 6), (6, 10))]
        assert torch.equal(torch.cat([rows.log_probs for rows in found]), given.log_probs)
        assert [value for rows in found for value in rows.nll] == list(given.nll)
    with pytest.raises(AssertionError, match="never stored"):
        stored.rows(TOKENS, 0, 1)
    stored.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    stored = StoredTeacher(10, 32, tmp_path)
    stored.store(Rows.of_logits(LOGITS, TOKENS[1:]))
    assert list(tmp_path.iterdir()) == []
    stored.close()


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 32 * 4))
    with pytest.raises(ConfigError, match="choose another place with --scratch"):
        StoredTeacher(10, 32, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="cannot be used"):
        StoredTeacher(10, 32, tmp_path / "nowhere")
