"""Writing model folders: safetensors shards streamed tensor by tensor, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import DTYPES, INDEX, SINGLE
from nvfp4_runtime.errors import ConfigError

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor about to be written; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardWriter:
    """Writes known tensors in any order, one in memory at a time; the index is written when there are several shards.

    with ShardWriter(folder, specs) as writer:
        writer.write(name, tensor)

    reopen  go on with files of exactly these specs that an earlier writer left, where there are any; `keep` names what
            is in them already
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        reopen: bool = False,
    ) -> None:
        shards = _deal(specs, max_shard_bytes)
        self._folder = folder
        self._reopen = reopen
        self._missing = {spec.name for spec in specs}
        self._places: dict[str, tuple[BinaryIO, int, TensorSpec]] = {}
        self._weight_map: dict[str, str] = {}
        self._files: list[BinaryIO] = []
        self._total_bytes = sum(spec.nbytes for spec in specs)
        for i, shard in enumerate(shards):
            name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            self._start_file(name, shard)

    def _start_file(self, file_name: str, specs: list[TensorSpec]) -> None:
        # widest elements first: every tensor then starts aligned to its own element size
        specs = sorted(specs, key=lambda s: (-DTYPES[s.dtype].itemsize, s.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = [], 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.nbytes],
            }
            offsets.append(end)
            end += spec.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        start = struct.pack("<Q", len(raw)) + raw
        file = self._open(self._folder / file_name, start)
        self._files.append(file)
        data = len(start)
        for spec, offset in zip(specs, offsets, strict=True):
            self._places[spec.name] = (file, data + offset, spec)
            self._weight_map[spec.name] = file_name

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; it must be exactly as announced, and announced tensors are written once."""
        assert name in self._missing, f"{name} was not announced, or is written already"
        file, offset, spec = self._places[name]
        found = TensorSpec(name, _dtype_name(tensor.dtype), tuple(tensor.shape))
        assert found == spec, f"announced {spec}, got {found}"
        with naming(file.name):
            file.seek(offset)
            file.write(tensor_bytes(tensor))
            file.flush()  # what was written survives a kill of this process
        self._missing.remove(name)

    def read(self, name: str) -> Tensor:
        """The tensor in the place of `name`, whether written now or before."""
        file, offset, spec = self._places[name]
        file.seek(offset)
        raw = bytearray(file.read(spec.nbytes))
        raw += bytes(spec.nbytes - len(raw))  # a file that ends early was never written so far
        return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[spec.dtype]).reshape(spec.shape)

    def keep(self, name: str) -> None:
        """Count `name` as written: the reopened file holds it."""
        self._missing.remove(name)

    def has(self, name: str) -> bool:
        """Whether `name` has been written or kept."""
        return name in self._places and name not in self._missing

    def _open(self, path: Path, start: bytes) -> BinaryIO:
        if self._reopen and path.exists():
            file = path.open("r+b")
            if file.read(len(start)) == start:
                return file
            file.close()
        file = path.open("w+b")
        with naming(path):
            file.write(start)
            file.flush()
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            for file in self._files:
                with contextlib.suppress(OSError):  # a full disk again; the first error is on its way
                    file.close()
            return
        for file in self._files:
            with naming(file.name):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        assert not self._missing, f"announced but never written: {sorted(self._missing)[:8]}"
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(self._weight_map.items())),
            }
            write_json(self._folder / INDEX, index)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> None:
    with naming(path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises ConfigError when `out` exists and is not an empty folder.
    """
    out = free_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(out), dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private; a model folder is not
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def free_place(out: Path) -> Path:
    """Where the folder `out` will stand: symbolic links followed, which stay and lead to the new folder.

    Raises ConfigError when something is there that is not an empty folder, and when the links lead in a circle.
    """
    place = Path(os.path.realpath(out))
    if place.is_symlink():
        raise ConfigError(f"{out} is a symbolic link that leads in a circle; choose another or remove it", "OUT")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another or remove it", "OUT")
    return place


def check_place(out: Path, source: Path | None) -> Path:
    """`free_place`, and a trial that a folder can be made there: asked before hours of work, not after.

    source  the folder that is read, where it is a user's; a result inside it would be taken for a part of it

    Raises ConfigError, and OSError where the system lets nothing be written there.
    """
    place = free_place(out)
    if source is not None and place.is_relative_to(origin := Path(os.path.realpath(source))):
        raise ConfigError(f"{out} lies inside {source}, which is read; choose a place outside {origin}", "OUT")
    above = next(folder for folder in place.parents if folder.exists())
    os.rmdir(tempfile.mkdtemp(prefix=temporary_prefix(place), dir=above))
    return place


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of writing, such as a full disk's, name `path`: the system itself does that only when opening."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def temporary_prefix(out: Path) -> str:
    """How `new_folder`'s temporary folders for `out` begin: what a killed run may have left behind."""
    return f".{out.name}.partial-"


def _deal(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
