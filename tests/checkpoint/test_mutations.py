"""Hostile files: a share of the 5,000 mutations in a child of bounded memory, absurd configs, a booby-trapped folder.

All of them: `python -m tests.checkpoint.mutations --count 5000` (see there for what counts as a failure).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from tests import tiny

ROOT = Path(__file__).parents[2]
SHARE = 900


def test_a_damaged_checkpoint_is_refused_clearly_or_loads() -> None:
    command = [sys.executable, "-m", "tests.checkpoint.mutations", "--count", str(SHARE), "--seed", "100000"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout)["outcomes"]
    assert sum(outcomes.values()) == SHARE
    assert outcomes["loaded"] < SHARE / 2  # the damage is real
    assert all(outcomes.get(kind) for kind in ("MissingTensorError", "TensorShapeError", "UnsupportedFormatError"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 10**400),
        ("head_dim", 10**9),
        ("vocab_size", 2**40),
        ("max_position_embeddings", 2**31 - 1),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**400),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": float("nan")}),
        ("rope_parameters", {"rope_theta": [1]}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "attention_factor": "much"}),
        ("eos_token_id", {"a": 1}),
        ("eos_token_id", [None]),
        ("layer_types", [[], {}]),
        ("hidden_act", ["silu"]),
    ],
)
def test_absurd_config_values_are_refused_before_anything_is_sized_by_them(
    tmp_path: Path, field: str, value: Any
) -> None:
    folder = tiny.tiny_llama(tmp_path, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))
    assert len(str(raised.value)) < 500


def test_nothing_in_a_booby_trapped_folder_runs(tmp_path: Path) -> None:
    """auto_map, a tokenizer class of its own, a pickle that would run, a template and a sitecustomize: all are data."""
    folder, sprung = tmp_path / "trap", tmp_path / "sprung"
    trap = f"open({str(sprung)!r}, 'w').close()\n"
    auto_map = {
        "AutoConfig": "configuration_trap.Trap",
        "AutoModelForCausalLM": "modeling_trap.Trap",
        "AutoTokenizer": ["tokenization_trap.Trap", None],
    }
    tiny.tiny_nvfp4_llama(folder, auto_map=auto_map, trust_remote_code=True, custom_code=True)
    for name in ("configuration_trap", "modeling_trap", "tokenization_trap", "sitecustomize", "conftest", "__init__"):
        (folder / f"{name}.py").write_text(trap)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": auto_map, "tokenizer_class": "Trap", "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    # protocol 0: calls builtins.exec(trap) when unpickled
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + trap.strip().encode() + b"\ntR.")
    code = (
        "from nvfp4_runtime import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, backend='reference', num_blocks=16)\n"
        "out = llm.generate(['abc'], SamplingParams(temperature=0.0, max_tokens=2))\n"
        "assert len(out[0].token_ids) >= 1\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not sprung.exists()
    subprocess.run([sys.executable, "-c", trap], check=True)  # the trap works
    assert sprung.exists()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="pickled weights run code when opened"):
        Checkpoint.open(folder)


def test_an_unknown_architecture_is_not_looked_for_in_the_folder(tmp_path: Path) -> None:
    folder = tiny.tiny_llama(
        tmp_path, tokenizer=False, architectures=["Trap"], auto_map={"AutoModelForCausalLM": "modeling_trap.Trap"}
    )
    with pytest.raises(UnsupportedFormatError, match="'Trap'"):
        load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))
