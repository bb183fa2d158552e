"""Where the teacher's answers come from: a teacher beside the students, or a file that one pass of it filled."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate.divergence import Rows
from nvfp4_runtime.evaluate.scorer import Scorer

DISK_MARGIN = 1.05


class Teacher(Protocol):
    def rows(self, tokens: tuple[int, ...], start: int, stop: int) -> Rows:
        """The teacher's answers after the tokens at `start` .. `stop - 1`; asked for in order."""
        ...


class LiveTeacher:
    """The teacher, loaded and computing."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def rows(self, tokens: tuple[int, ...], start: int, stop: int) -> Rows:
        return self._scorer.rows(tokens, start, stop)


class StoredTeacher:
    """Log-probabilities in float32 in a temporary file without a name: however the process ends, the file is gone."""

    def __init__(self, num_rows: int, vocab_size: int, scratch: Path) -> None:
        """Raises ConfigError when `scratch` has no room for that many rows."""
        size = num_rows * vocab_size * 4
        try:
            free = shutil.disk_usage(scratch).free
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as this object
        except OSError as error:
            raise ConfigError(f"the folder {scratch} cannot be used: {error.strerror or error}", "--scratch") from error
        if size * DISK_MARGIN > free:
            self.close()
            raise ConfigError(
                f"the teacher's log-probabilities take {size / 1e9:.2f} GB and {scratch} has {free / 1e9:.2f} GB free; "
                "choose another place with --scratch, or fewer --windows",
                "--scratch",
            )
        self._vocab_size = vocab_size

    def store(self, rows: Rows) -> None:
        self._file.write(rows.log_probs.contiguous().numpy().data)

    def rewind(self) -> None:
        """Start again at the first row."""
        self._file.seek(0)

    def rows(self, tokens: tuple[int, ...], start: int, stop: int) -> Rows:
        count = (stop - start) * self._vocab_size
        raw = bytearray(self._file.read(4 * count))
        assert len(raw) == 4 * count, f"{len(raw)} bytes of {4 * count}: rows were asked for that were never stored"
        log_probs = torch.frombuffer(raw, dtype=torch.float32).view(stop - start, self._vocab_size)
        return Rows.of_log_probs(log_probs, tokens[start + 1 : stop + 1])

    def close(self) -> None:
        self._file.close()
