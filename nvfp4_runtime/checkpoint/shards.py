"""Safetensors files on disk: headers validated by us, tensors read lazily through memory maps, every use recorded.

Only `.safetensors` is read. Pickled weights run code when opened, so a folder that has nothing else is refused.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvfp4_runtime.errors import CheckpointError, MissingTensorError, TensorShapeError

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_JSON_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shards:
    """Every tensor of a checkpoint folder by exact name. Data is mapped on first read, headers are read at once.

    `used` holds the names read so far; `notes` what was odd but harmless about the files; `metadata` the files' own
    remarks (__metadata__), which writers use for the most various things.
    """

    def __init__(self, folder: Path, only: str | None = None) -> None:
        """`only`: the one file to read, where the folder is no model's.

        Raises CheckpointError when files are missing, truncated, contradict their headers or repeat a tensor.
        """
        self.folder = folder
        self.notes: list[str] = []
        self.used: set[str] = set()
        self._files = _find_files(folder) if only is None else [folder / only]
        self._tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in self._files:
            infos, metadata = _parse(file)
            self.metadata.update(metadata)
            for info in infos:
                if (first := self._tensors.get(info.name)) is not None:
                    raise CheckpointError(
                        f"tensor {info.name!r} is in both {first.file.name} and {file.name}; expected it once: "
                        "remove the shard that does not belong to this checkpoint"
                    )
                self._tensors[info.name] = info
        if only is None:
            self._check_against_index()
        self._open = ExitStack()
        self._handles: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self._tensors.values())

    @property
    def where(self) -> str:
        """The files in words, for messages."""
        if len(self._files) == 1:
            return str(self._files[0])
        return f"{self.folder} ({len(self._files)} shards)"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._files)

    def info(self, name: str) -> TensorInfo | None:
        return self._tensors.get(name)

    def require(self, name: str, hint: str = "") -> TensorInfo:
        """The tensor's header entry, or MissingTensorError."""
        if (info := self._tensors.get(name)) is None:
            raise MissingTensorError(name, self.where, hint)
        return info

    def read(
        self, name: str, shape: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = PLAIN, hint: str = ""
    ) -> Tensor:
        """The tensor `name`, marked as used; a view of the mapped file, so nothing is copied until it is touched.

        Raises MissingTensorError, or TensorShapeError when `shape` or `dtypes` (safetensors names) do not hold.
        """
        info = self.require(name, hint)
        if info.dtype not in dtypes or (shape is not None and info.shape != shape):
            wanted = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
            raise TensorShapeError(name, info.file.name, wanted, str(info))
        handle = self._handles.get(info.file)
        try:
            if handle is None:
                handle = self._open.enter_context(safe_open(info.file, framework="pt"))
                self._handles[info.file] = handle
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name!r} from {info.file}: {error}") from error
        self.used.add(name)
        return tensor

    def read_scalar(self, name: str, hint: str = "") -> float:
        """A scale stored as [] or [1], in any float type."""
        info = self.require(name, hint)
        if info.shape not in ((), (1,)):
            raise TensorShapeError(name, info.file.name, "one value, [] or [1]", str(info))
        return float(self.read(name).to(torch.float32).reshape(()))

    def close(self) -> None:
        """Drop the file handles; tensors already read stay valid."""
        self._handles.clear()
        self._open.close()

    def _check_against_index(self) -> None:
        path = self.folder / INDEX
        if not path.exists():
            return
        weight_map = _weight_map(path)
        for name, file in weight_map.items():
            info = self._tensors.get(name)
            if info is None or info.file.name != file:
                found = f"it is in {info.file.name}" if info is not None else "no shard has it"
                raise MissingTensorError(name, file, f"{INDEX} places it there and {found}")
        if unlisted := [name for name in self._tensors if name not in weight_map]:
            self.notes.append(f"{len(unlisted)} tensor(s) are in shards but not in {INDEX}, e.g. {unlisted[0]!r}")


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is absent, oversized, not JSON or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; expected a JSON file of at most 100 MB")
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_header(file: Path) -> list[TensorInfo]:
    """Parse and check a safetensors header: sizes, dtypes, and offsets that cover the data exactly once.

    Raises CheckpointError naming the file and the first contradiction. Source: the safetensors format description.
    """
    return _parse(file)[0]


def _parse(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The header's tensors, and its metadata."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: it has {size} bytes and its first eight announce a "
                    f"header of {length}; fetch it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is a JSON {type(header).__name__}; expected an object")
    remarks = header.pop("__metadata__", None)
    metadata = {k: v for k, v in remarks.items() if isinstance(v, str)} if isinstance(remarks, dict) else {}
    data_bytes = size - 8 - length
    placed = sorted((_tensor_info(file, name, entry) for name, entry in header.items()), key=lambda item: item[1])
    tensors, end = [], 0
    for info, (begin, stop) in placed:
        if begin != end:
            raise CheckpointError(f"{file}: tensor {info.name!r} starts at byte {begin} of the data; expected {end}")
        tensors.append(info)
        end = stop
    if end != data_bytes:
        raise CheckpointError(
            f"{file} holds {data_bytes} bytes of data and its header describes {end}: the file is "
            f"{'truncated' if data_bytes < end else 'longer than it says'}; fetch it again"
        )
    return tensors, metadata


def _tensor_info(file: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: the header entry of {name!r} is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{file}: tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}; expected lists of sizes"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: the header gives tensor {name!r} {end - begin} bytes, but {dtype} {shape} needs {nbytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, file), (begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return result


def _find_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        if single.exists() and SINGLE not in names:
            raise CheckpointError(
                f"{folder} has both {SINGLE} and an {INDEX} that does not name it; keep the one that is meant"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} names {len(missing)} shard(s) that do not exist: {', '.join(missing[:8])}")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder} has {len(found)} .safetensors files and no {INDEX}; expected one or the other")
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has no .safetensors file, only {', '.join(pickles[:4])}: pickled weights run code when opened "
            "and are never read; convert them to safetensors first"
        )
    raise CheckpointError(f"{folder} has no .safetensors file; expected {SINGLE} or {INDEX} with its shards")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map; expected tensor names mapped to shard file names")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {file!r}; expected a .safetensors file of the same folder")
    return weight_map
