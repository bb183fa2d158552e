"""Seeded damage to sound checkpoints of every dialect, loaded as a server would: a clear error or a model, always.

    python -m tests.checkpoint.mutations --count 5000 --seed 0

Anything but a CheckpointError, a ConfigError or a loaded model ends the run with the seed that shows it: another
exception, a load of more than 10 seconds, or memory beyond what the sound checkpoints take.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.eos import eos_token_ids
from nvfp4_runtime.errors import CheckpointError, ConfigError, NoBackendError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from tests import dialects
from tests.tiny import write_tokenizer

MAX_SECONDS = 10
MAX_GROWTH_BYTES = 100 << 20  # the checkpoints have 0.3 to 2.5 MB
ADDRESS_SPACE = 4 << 30  # beyond what the process has when it starts: no absurd size is ever allocated
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 7, 10**12, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.5, 1e-320),
    *(
        "",
        "NaN",
        "../../etc/passwd",
        "\x00",
        "fp8",
        "re:(a+)+$",
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        [1] * 1000,
        "x" * 5000,
    ),
)


def load(folder: Path) -> None:
    """What a server does with a folder up to the first token, short of the KV cache."""
    ckpt = Checkpoint.open(folder)
    model = load_model(ckpt, Kernels([ReferenceBackend()], "float32", "w4a16"), max_positions=64)
    eos_token_ids(folder, model.config.eos_token_ids)
    assert ckpt.nbytes_by_format()
    assert all(isinstance(note, str) for note in ckpt.notes)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 8, 100))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_early(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        data[rng.randrange(min(3000, len(data)))] ^= 1 << rng.randrange(8)


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randrange(1, 64))


def overwrite(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    size = min(rng.choice((1, 64, 4096)), len(data) - at)
    data[at : at + size] = rng.choice((bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)))


def header_length(data: bytearray, rng: random.Random) -> None:
    data[:8] = struct.pack("<Q", rng.choice((0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1, rng.getrandbits(64))))


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(truncate, flip, flip, flip_early, flip_early, insert, overwrite, overwrite, header_length),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


def edit_json(value: Any, rng: random.Random) -> Any:
    """One to three values replaced, dropped, moved, or nested without end."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = places(value)
        if not spots:
            return copy.deepcopy(rng.choice(ODD))
        container, key = rng.choice(spots)
        other, other_key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 2 and isinstance(container[key], int):
            container[key] = container[key] * rng.choice((-1, 2, 16, 10**9, 10**15)) + rng.choice((-1, 0, 1))
        elif kind == 3 and isinstance(container, dict):
            container[f"{key}{rng.choice(('', '_', '.weight', 's'))}x"] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return value


def damage_json(path: Path, rng: random.Random) -> None:
    text = path.read_text()
    if rng.random() < 0.15:
        path.write_text(
            rng.choice(("[" * 100_000, "null", "[]", "{}", text + "}", '{"a":1,"a":2}', "\ufeff" + text, ""))
        )
    else:
        try:
            path.write_text(json.dumps(edit_json(json.loads(text), rng)))
        except ValueError:  # the edit made a number with more digits than Python writes
            path.write_text(text[: len(text) // 2])


def damage_header(path: Path, rng: random.Random) -> None:
    """A header that is valid JSON and lies: other dtypes, shapes, offsets, names."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F16", "F32", "F64", "X", None, 3)
        )
    elif kind == 1:
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**62, 4], [2**63], list(reversed(entry["shape"])), [1, *entry["shape"]])
        )
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-1, 1, 16, 2**40, -(2**40)))
    elif kind == 3:  # another type and shape of the same number of bytes
        entry["dtype"] = rng.choice(("U8", "F8_E4M3", "I8", "BOOL"))
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["shape"] = rng.choice(
            ([size], [1, size], [size, 1], [1, 1, size], [2, size // 2] if size % 2 == 0 else [size])
        )
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header[
            rng.choice((name + "x", name.replace("weight", "weight_packed"), name.rpartition(".")[0], "a" * 10_000))
        ] = header.pop(name)
    elif kind == 6:
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        edit_json(header, rng)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def damage_shards(folder: Path, rng: random.Random) -> None:
    """An index that names files twice, wrongly, or in a circle; shards lost, repeated, or linked to themselves."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    kind = rng.randrange(6)
    if kind == 0:
        rng.choice(shards).unlink()
    elif kind == 1:
        twin = folder / rng.choice(("model.safetensors", "extra.safetensors", shards[0].name + "2"))
        twin.write_bytes(rng.choice(shards).read_bytes())
    elif kind == 2:
        victim = rng.choice(shards)
        victim.unlink()
        victim.symlink_to(victim.name)
    elif kind == 3:
        victim = rng.choice(shards)
        victim.unlink()
        victim.mkdir()
    elif kind == 4 and index.exists():
        whole = json.loads(index.read_text())
        for name in rng.sample(sorted(whole["weight_map"]), 3):
            whole["weight_map"][name] = rng.choice(
                (index.name, "../x.safetensors", "/dev/zero", "", shards[0].name, "x.bin")
            )
        index.write_text(json.dumps(whole))
    else:
        rng.choice(shards).write_bytes(b"")


def mutate(folder: Path, rng: random.Random) -> None:
    """One damage somewhere in the folder."""
    tensors = sorted(folder.glob("*.safetensors"))
    kind = rng.random()
    if kind < 0.35:
        path = rng.choice([*tensors, *folder.glob("*.json")])
        data = bytearray(path.read_bytes())
        rng.choice(BYTES)(data, rng)
        path.write_bytes(data)
    elif kind < 0.6:
        damage_header(rng.choice(tensors), rng)
    elif kind < 0.92:
        damage_json(rng.choice(sorted(folder.glob("*.json"))), rng)
    else:
        damage_shards(folder, rng)


class TooSlowError(Exception):
    """A load did not end."""


def _alarm(*_: object) -> None:
    raise TooSlowError(f"no end after {MAX_SECONDS} s")


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """Try `count` mutations; raises what no mutation may cause, with the seed in a note."""
    model = dialects.tiny_model()
    sound: list[Path] = []
    for i, dialect in enumerate(dialects.dialects(model).values()):
        folder = dialect.save(work / f"sound{i}", model, shards=1 + i % 3)
        write_tokenizer(folder)
        load(folder)
        sound.append(folder)
    signal.signal(signal.SIGALRM, _alarm)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESS_SPACE, hard))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes: Counter[str] = Counter()
    slowest = (0.0, seed)
    started = time.perf_counter()
    for i in range(seed, seed + count):
        rng = random.Random(i)
        folder = work / "damaged"
        shutil.copytree(rng.choice(sound), folder)
        mutate(folder, rng)
        signal.alarm(MAX_SECONDS)
        begun = time.perf_counter()
        try:
            load(folder)
            outcomes["loaded"] += 1
        except (CheckpointError, ConfigError, NoBackendError) as error:  # the last: float16 heads and the like
            check_message(str(error), i)
            outcomes[type(error).__name__] += 1
        except BaseException as error:
            error.add_note(f"mutation seed {i}")
            raise
        finally:
            signal.alarm(0)
        slowest = max(slowest, (time.perf_counter() - begun, i))
        shutil.rmtree(folder)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert growth < MAX_GROWTH_BYTES, f"peak memory grew by {growth} bytes"
    return {
        "outcomes": dict(outcomes),
        "growth_bytes": growth,
        "seconds": time.perf_counter() - started,
        "slowest": {"seconds": slowest[0], "seed": slowest[1]},
    }


def check_message(message: str, seed: int) -> None:
    """An error says something, and not the whole file."""
    if not 20 < len(message) < 20_000:
        raise AssertionError(f"mutation seed {seed}: a message of {len(message)} characters: {message[:200]}")


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits for the first
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(run(options.count, options.seed, Path(work))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
