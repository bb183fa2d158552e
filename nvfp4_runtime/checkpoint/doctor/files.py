"""Opening a folder whose files contradict each other: what the loader refuses at the door is a finding here.

A file that is cut short or lies about itself stays an error: nothing in it can be trusted.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.checkpoint.shards import INDEX, SINGLE, Shards, TensorInfo, load_json, read_header
from nvfp4_runtime.errors import CheckpointError

_SHOWN = 3


class LooseShards(Shards):
    """`Shards` that open as long as one weight file can be read; `findings` holds every contradiction.

    Of a tensor that two files hold, the one that the index names counts, else the first file's; `copies` has the rest.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when there is no weight file, or one is truncated or contradicts its own header."""
        self.folder = folder
        self.notes = []
        self.used = set()
        self.metadata = {}
        self._open = ExitStack()
        self._handles = {}
        self._tensors = {}
        self._lock = Lock()
        self.findings: list[Finding] = []
        self.copies: list[TensorInfo] = []
        self.index = _index(folder)
        self._files = self._choose_files()
        for file in self._files:
            for info in read_header(file):
                self._add(info)
            self.metadata.update(_remarks(file))
        self._report_copies()
        if self.index is not None:
            self._compare_with_index(self.index)

    def read(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Shards.read`, from any thread."""
        with self._lock:
            return super().read(*args, **kwargs)

    def _choose_files(self) -> list[Path]:
        present = sorted(self.folder.glob("*.safetensors"))
        if self.index is None:
            return self._without_index(present)
        named = sorted(set(self.index["weight_map"].values()))
        found = [name for name in named if (self.folder / name).is_file()]
        if missing := [name for name in named if name not in found]:
            lost = [tensor for tensor, file in self.index["weight_map"].items() if file in missing]
            self._find(
                "index-missing-file",
                "error",
                f"{INDEX} names {len(missing)} shard(s) that do not exist, with {len(lost)} tensor(s): {some(missing)}",
                "fetch the missing files again",
                missing,
            )
        if not found:
            raise CheckpointError(f"{self.folder / INDEX} names {len(named)} shard(s) and none of them exists")
        if stray := [file.name for file in present if file.name not in named]:
            severity = "error" if SINGLE in stray else "warning"
            self._find(
                "index-stray-file",
                severity,
                f"{len(stray)} .safetensors file(s) lie beside the model and {INDEX} does not name them: {some(stray)}"
                + ("; which of the two is the model cannot be told" if severity == "error" else ""),
                "remove them from the folder; some loaders read every .safetensors file they find",
                stray,
            )
        return [self.folder / name for name in found]

    def _without_index(self, present: list[Path]) -> list[Path]:
        if not present:
            Shards(self.folder)  # says what is there instead, and why that cannot be read
            raise AssertionError("a folder without weight files was opened")
        if (self.folder / SINGLE) in present:
            if len(present) > 1:
                stray = [file.name for file in present if file.name != SINGLE]
                self._find(
                    "index-stray-file",
                    "warning",
                    f"{len(stray)} .safetensors file(s) lie beside {SINGLE}: {some(stray)}",
                    "remove them from the folder; some loaders read every .safetensors file they find",
                    stray,
                )
            return [self.folder / SINGLE]
        if len(present) > 1:
            names = [file.name for file in present]
            self._find(
                "index-absent",
                "error",
                f"{len(present)} .safetensors files and no {INDEX}: {some(names)}",
                f"fetch {INDEX} again; --repair writes one",
                names,
            )
        return present

    def _add(self, info: TensorInfo) -> None:
        first = self._tensors.get(info.name)
        if first is None:
            self._tensors[info.name] = info
        elif self.index is not None and self.index["weight_map"].get(info.name) == info.file.name:
            self._tensors[info.name] = info
            self.copies.append(first)
        else:
            self.copies.append(info)

    def _report_copies(self) -> None:
        if not self.copies:
            return
        names = [info.name for info in self.copies]
        kept = self._tensors[names[0]]
        self._find(
            "duplicate-tensor",
            "error",
            f"{len(names)} tensor(s) are in two files, e.g. {names[0]} in {kept.file.name} and "
            f"{self.copies[0].file.name}",
            f"keep one copy; --repair keeps the one {INDEX} names, or the one of the first file",
            names,
        )

    def _compare_with_index(self, index: dict[str, Any]) -> None:
        weight_map: dict[str, str] = index["weight_map"]
        present = {file.name for file in self._files}
        gone = [name for name, file in weight_map.items() if file in present and name not in self._tensors]
        lost = gone + [n for n, file in weight_map.items() if file not in present and n not in self._tensors]
        if gone:
            self._find(
                "index-missing-tensor",
                "error",
                f"{INDEX} places {len(gone)} tensor(s) that no shard holds: {some(gone)}",
                "fetch the shards and their index again; they are of different versions",
                gone,
            )
        moved = [n for n, info in self._tensors.items() if n in weight_map and weight_map[n] != info.file.name]
        if moved:
            self._find(
                "index-wrong-file",
                "error",
                f"{INDEX} places {len(moved)} tensor(s) in another shard than holds them: {some(moved)}",
                "fetch the index again; --repair writes a true one",
                moved,
            )
        if unlisted := [name for name in self._tensors if name not in weight_map]:
            self._find(
                "index-stray-tensor",
                "warning",
                f"{len(unlisted)} tensor(s) are in shards and not in {INDEX}: {some(unlisted)}",
                "fetch the index again; --repair writes one that lists them",
                unlisted,
            )
        metadata = index.get("metadata")
        declared = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = sum(info.nbytes for info in self._tensors.values())
        if type(declared) is int and declared != actual and not lost:
            self._find(
                "index-total-size",
                "warning",
                f"{INDEX} gives total_size {declared:,}, and the tensors have {actual:,} bytes",
                "fetch the index again; --repair writes the true size",
                [INDEX],
            )

    def _find(self, id: str, severity: Any, message: str, remedy: str, layers: list[str]) -> None:
        self.findings.append(Finding(id, severity, message, remedy, tuple(layers)))


def _remarks(file: Path) -> dict[str, str]:
    """The __metadata__ of a file whose header has been checked."""
    try:
        with safe_open(file, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot open {file}: {error}") from error


def some(names: list[str] | tuple[str, ...]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _index(folder: Path) -> dict[str, Any] | None:
    """The index as it stands, or None; CheckpointError when it is unusable as one."""
    path = folder / INDEX
    if not path.exists():
        return None
    index = load_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no usable weight_map; expected tensor names mapped to shard file names")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the shard {file!r}; expected a .safetensors file of the same folder")
    return index
