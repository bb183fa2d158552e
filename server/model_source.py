"""Which model folder `nvfp4 serve` loads, and what the folder says about sampling."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from nvfp4_runtime.errors import ConfigError, InvalidParameterError
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.tokenizer import read_json
from server.config import environment_flags

# generation_config.json's name -> ours, and its type
_SAMPLING_DEFAULTS: dict[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


def model_argument(args: argparse.Namespace) -> str | None:
    """MODEL as it was given, on the command line or in the environment."""
    model = args.model or environment_flags(["model"]).get("model")
    return None if model is None else os.path.expanduser(model)


def model_folder(args: argparse.Namespace) -> Path:
    """The local folder to load; see `resolve_model`."""
    return resolve_model(model_argument(args), args.allow_download)


def resolve_model(model: str | None, allow_download: bool) -> Path:
    """The local folder to load. Raises ConfigError when there is none and none may be fetched."""
    if model is None:
        return default_model()
    if Path(model).is_dir():
        return Path(model)
    if not allow_download:
        raise ConfigError(
            f"there is no model folder {model}; give a local folder, or --allow-download to fetch a hub id",
            "--allow-download",
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"fetching {model} needs the package huggingface_hub: pip install huggingface_hub", "--allow-download"
        ) from error
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(f"{model} could not be fetched: {error}", "--allow-download") from error


def default_model() -> Path:
    """The default model's folder in the cache, made there on first use by a process of its own (it needs torch)."""
    from nvfp4_runtime.quantize.default_model import cached_default_model

    folder = cached_default_model()
    if folder is None:
        # -P: modules of the working directory must not take the place of ours
        command = [sys.executable, "-P", "-m", "server.cli", "prepare"]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code != 0:
            raise SystemExit(code)  # it has said why
        folder = cached_default_model()
        assert folder is not None, "prepare ended well and made nothing"
    return folder


def sampling_defaults(folder: Path, args: argparse.Namespace) -> dict[str, float | int]:
    """The checkpoint's own defaults, as vLLM takes them from generation_config.json.

    Raises ConfigError for a value that no request could be served with.
    """
    if args.generation_config == "none":
        return {}
    declared = read_json(folder / "generation_config.json")
    found = {
        ours: _sampling_default(theirs, declared[theirs], kind)
        for theirs, (ours, kind) in _SAMPLING_DEFAULTS.items()
        if declared.get(theirs) is not None
    }
    try:
        SamplingParams(**found).validate()  # type: ignore[arg-type]  # each is of its field's type: made so above
    except InvalidParameterError as error:
        theirs = next(theirs for theirs, (ours, _) in _SAMPLING_DEFAULTS.items() if ours == error.param)
        raise _unusable_default(theirs, str(error)) from error
    return found


def _sampling_default(name: str, value: object, kind: type[int] | type[float]) -> float | int:
    whole = kind is float or (isinstance(value, int | float) and value == value // 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not whole or abs(value) >= 2**63:
        expected = "a number" if kind is float else "a whole number"
        raise _unusable_default(name, f"expected {expected}, found {value!r:.64}")
    return kind(value)


def _unusable_default(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"generation_config.json: {name}: {why}; correct the file, or start with --generation-config none",
        "--generation-config",
    )
