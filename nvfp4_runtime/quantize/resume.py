"""A model folder that survives the end of the process making it: finished tensors stay, and the next run goes on.

Beside OUT lies `.OUT.partial-resume` with the shards in the making and a journal: one line says what is being made from
what, then one line per finished tensor with its CRC-32. Tensors are checked against it before they are believed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.writer import (
    ShardWriter,
    TensorSpec,
    free_place,
    naming,
    temporary_prefix,
    tensor_bytes,
)
from nvfp4_runtime.errors import ConfigError, NVFP4Error

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"


class Partial:
    """The folder in the making.

    folder    where the files go
    finished  tensor -> CRC-32 of its bytes, from the journal
    """

    def __init__(self, folder: Path, journal: TextIO, finished: dict[str, int]) -> None:
        self.folder = folder
        self.finished = finished
        self._journal = journal

    def record(self, name: str, crc: int) -> None:
        with naming(self.folder / JOURNAL):
            self._journal.write(json.dumps({"tensor": name, "crc32": crc}) + "\n")
            self._journal.flush()


class JournalledWriter:
    """A ShardWriter whose finished tensors are on record, and which starts with those of an earlier run."""

    def __init__(self, partial: Partial, specs: Sequence[TensorSpec], max_shard_bytes: int) -> None:
        self._partial = partial
        self._writer = ShardWriter(partial.folder, specs, max_shard_bytes, reopen=bool(partial.finished))
        self.num_kept = 0
        for spec in specs:
            crc = partial.finished.get(spec.name)
            if crc is not None and zlib.crc32(tensor_bytes(self._writer.read(spec.name))) == crc:
                self._writer.keep(spec.name)
                self.num_kept += 1
        if self.num_kept:
            logger.info("going on after %d of %d tensors, made by an earlier run", self.num_kept, len(specs))

    def write(self, name: str, tensor: Tensor) -> None:
        self._writer.write(name, tensor)
        self._partial.record(name, zlib.crc32(tensor_bytes(tensor)))

    def has(self, name: str) -> bool:
        return self._writer.has(name)

    def read(self, name: str) -> Tensor:
        return self._writer.read(name)

    def __enter__(self) -> JournalledWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


@contextmanager
def resumable_folder(out: Path, recipe: dict[str, Any], source: dict[str, Any]) -> Iterator[Partial]:
    """A folder that becomes `out` when the block ends well, and waits for the next run when it is interrupted.

    recipe, source  plain JSON: what is made, from what. A partial folder made otherwise is refused, not mixed
    An NVFP4Error inside means that this can never become a model: then the partial folder is removed.

    Raises ConfigError when `out` exists and is not an empty folder, when another run is making it, and when the partial
    folder there belongs to another recipe or source.
    """
    out = free_place(out)
    folder = partial_folder(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder, and {out} is to be made in a folder of that name; remove it", "OUT")
    folder.mkdir(parents=True, exist_ok=True)
    # Bytes that are not UTF-8 are no journal's, nor is what they stand in: both show as lines that say nothing.
    with (folder / JOURNAL).open("a+", encoding="utf-8", errors="replace") as journal:
        lock(journal, f"another run is making {out} ({folder} is locked); wait for it")
        finished = _open_journal(journal, folder, {"recipe": recipe, "source": source})
        try:
            yield Partial(folder, journal, finished)
        except NVFP4Error:
            shutil.rmtree(folder)
            raise
        except BaseException:
            logger.warning("interrupted: what is finished stays in %s; the same command goes on from there", folder)
            raise
        # In this order: a folder that holds a journal is in the making, until it stands in its place.
        folder.rename(out)
        (out / JOURNAL).unlink()


def lock(file: TextIO, refusal: str) -> None:
    """The file is this process's until it is closed. Raises ConfigError, saying `refusal`, where it is another's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(refusal, "OUT") from error


def partial_folder(out: Path) -> Path:
    """Where `out` is while it is being made."""
    return out.parent / f"{temporary_prefix(out)}resume"


def fingerprint(shards: Shards, raw_config: dict[str, Any]) -> dict[str, Any]:
    """What identifies a source for resuming: config.json, and each file's size and time of change."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in shards.files}
    return {"folder": str(shards.folder.resolve()), "config": raw_config, "files": files}


def text_digest(texts: Sequence[str] | None) -> int | None:
    """A calibration text's identity in a recipe."""
    return None if texts is None else zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass"))


def _open_journal(journal: TextIO, folder: Path, wanted: dict[str, Any]) -> dict[str, int]:
    journal.seek(0)
    lines = [_parse(line) for line in journal.read().split("\n")]
    if not lines or "recipe" not in lines[0]:
        if any(lines):
            raise ConfigError(f"{folder / JOURNAL} does not begin as a journal does; remove {folder}", "OUT")
        journal.truncate(0)
        with naming(folder / JOURNAL):
            journal.write(json.dumps(wanted) + "\n")
            journal.flush()
        return {}
    if changed := [key for key in wanted if lines[0].get(key) != json.loads(json.dumps(wanted[key]))]:
        raise ConfigError(
            f"{folder} holds the beginning of another run, whose {' and '.join(changed)} differ"
            f"{'s' if len(changed) == 1 else ''} ({_difference(lines[0], wanted, changed)}); "
            "give the options and the source of that run, or remove the folder to start anew",
            "OUT",
        )
    return {line["tensor"]: line["crc32"] for line in lines[1:] if line.keys() == {"tensor", "crc32"}}


def _parse(line: str) -> dict[str, Any]:
    """A journal line; {} for an empty one or one that a kill cut short."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _difference(found: dict[str, Any], wanted: dict[str, Any], changed: list[str]) -> str:
    """What differs, in a few words each: a number or a name as it is, of lists and tables only what differs in them."""
    parts = []
    for key in changed:
        old, new = found.get(key), json.loads(json.dumps(wanted[key]))
        old = old if isinstance(old, dict) else {}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                parts.append(_difference_of(name, old.get(name), new.get(name)))
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")


def _difference_of(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return _difference_of(f"{name} of {keys[0]}", old.get(keys[0]), new.get(keys[0])) + more
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(each, str) for each in old + new):
        lists = (("only there", [x for x in old if x not in new]), ("only now", [x for x in new if x not in old]))
        return f"{name}: " + ", ".join(f"{_some(each)} {where}" for where, each in lists if each)
    return f"{name}: {_short(old)} there, {_short(new)} now"


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _short(value: Any) -> str:
    """A number or a name; what is longer by its size, since half a table tells nothing."""
    if isinstance(value, dict | list):
        return f"{len(value)} entries"
    return "none" if value is None else str(value)[:100]
