"""Seeded damage to bytes, headers and JSON: inspect and repair give a report or a clear error, never anything else."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.render import render
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from nvfp4_runtime.errors import CheckpointError
from nvfp4_runtime.models.expected import expected
from tests.checkpoint.doctor.patients import sound

JUNK = (None, 0, -1, 1.5, "x", [], {}, True, 10**30, ["a"], {"a": 1}, [1])
TYPES = {"F8_E4M3": "U8", "U8": "F8_E8M0", "BF16": "F16", "F16": "BF16", "F32": "I32", "I32": "F32", "F8_E8M0": "I8"}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def damage_json(file: Path, rng: random.Random) -> None:
    value = json.loads(file.read_text())
    if found := list(places(value)):
        container, key = rng.choice(found)
        container[key] = rng.choice(JUNK)
    file.write_text(json.dumps(value))


def damage_header(file: Path, rng: random.Random) -> None:
    """Another type, another shape or another name for a tensor; the file's sizes still agree."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, kind = header[name], rng.choice(["type", "shape", "flat", "name"])
    if kind == "type":
        entry["dtype"] = TYPES.get(entry["dtype"], entry["dtype"])
    elif kind == "shape":
        rng.shuffle(entry["shape"])
    elif kind == "flat":
        entry["shape"] = rng.choice([[*entry["shape"], 1], [1, *entry["shape"]]])
    else:
        new = rng.choice([name.replace(".weight", ".weight_packed"), name.rpartition(".")[0], f"{name}_double_scale"])
        header.setdefault(new, header.pop(name))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def damage_bytes(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randrange(1, 50)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("experts", [False, True])
def test_a_damaged_folder_gives_a_report_or_a_clear_error(tmp_path, experts):
    original, parent = sound(tmp_path, experts=experts, shards=1 if experts else 2)
    rng = random.Random(experts)
    outcomes: Counter[str] = Counter()
    refusals: list[str] = []
    for i in range(60):
        folder, out = tmp_path / f"{i}", tmp_path / f"{i}-out"
        shutil.copytree(original, folder)
        files = sorted(folder.iterdir())
        damage = rng.choice([damage_json, damage_header, damage_header, damage_bytes])
        wanted = ".json" if damage is damage_json else ".safetensors"
        damage(rng.choice([file for file in files if file.suffix == wanted]), rng)
        with_parent = parent if rng.random() < 0.5 else None
        try:
            report = (
                inspect_and_repair(folder, out, with_parent, expect=expected)
                if i % 3 == 0
                else inspect(folder, with_parent, expect=expected)
            )
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert render(report)
            assert msgspec.json.encode(report)
            outcomes["sound" if report.sound else "findings"] += 1
        shutil.rmtree(folder)
    assert outcomes["findings"] >= 8  # the damage is real
    assert len(refusals) >= 4
    assert all(len(message) > 20 for message in refusals)
