"""What a run needs to go on: masters, optimizer moments and its place in the text, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.resume import lock

BEST = "best.safetensors"
_CURRENT, _BEFORE = "checkpoint", "checkpoint.before"
_TENSORS, _RECORD = "state.safetensors", "state.json"
_CLAIM, _LOCK = "run.json", "lock"


@dataclass(frozen=True)
class Loaded:
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole."""
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


def save(work: Path, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the checkpoint. Killed at any moment, this leaves the old one or the new one."""
    partial = work / ".checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_tensors(partial / _TENSORS, {**masters, **moments})
    (partial / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    shutil.rmtree(work / _BEFORE, ignore_errors=True)
    if (work / _CURRENT).exists():
        os.rename(work / _CURRENT, work / _BEFORE)
    os.rename(partial, work / _CURRENT)
    shutil.rmtree(work / _BEFORE, ignore_errors=True)


def load(work: Path, identity: Mapping[str, Any]) -> Loaded | None:
    """The checkpoint in `work`, None where there is none.

    Raises ConfigError when it belongs to another run: other text, teacher, student or schedule.
    """
    folder = next((work / name for name in (_CURRENT, _BEFORE) if (work / name / _RECORD).exists()), None)
    if folder is None:
        return None
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    _same(work, record["identity"], identity)
    return Loaded(load_file(folder / _TENSORS), record)


def _same(work: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(identity))
    if differing := sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key)):
        raise ConfigError(
            f"{work} holds a run with other {', '.join(differing)}; give the flags it was started with, choose another "
            "OUT, or remove the folder to start anew"
        )


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Nobody else trains in `work` meanwhile. Raises ConfigError where somebody does."""
    with (work / _LOCK).open("a", encoding="utf-8") as file:
        lock(file, f"another run trains in {work}; wait for it, or choose another OUT")
        yield


def claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Note what run `work` belongs to. Raises ConfigError when something in it is another's."""
    path = work / _CLAIM
    if path.exists() and any(each.name not in (_CLAIM, _LOCK) for each in work.iterdir()):
        _same(work, json.loads(path.read_text(encoding="utf-8")), identity)
    else:
        write_text(path, json.dumps(identity, indent=1))


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
