"""What to make, as the flags of `nvfp4 distill` say it, and whether that can be done."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.distill.loss import LOSSES
from nvfp4_runtime.distill.student import BLOCK_SCALES, BlockScales, Train
from nvfp4_runtime.distill.trainer import Schedule
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.resume import fingerprint

Mode = Literal["full", "blockwise", "scales"]
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SEEDS = 2**32  # from 0: times a million they still fit the generator's 64 bits


@dataclass(frozen=True)
class Wishes:
    """What to make.

    data, held      sources as data.py takes them; held None: a part of data
    synthesize      completions to sample from the teacher and train on; data, if given, are then the prompts
    student         an NVFP4 folder in ModelOpt's layout; None: AWQ on the beginning of data. One that `distill` made is
                    gone on with from its float32 weights, where its `.training` folder still stands beside it
    dtype           what teacher and student compute in; the rounded operands are the same
    tokens          to train on, rounded up to whole steps of batch_tokens
    """

    data: str | None = None
    synthesize: int | None = None
    held: str | None = None
    student: Path | None = None
    act: Numerics = "w4a4"
    mode: Mode = "full"
    train: Train = "all"
    block_scales: BlockScales = "frozen"
    seq: int = 512
    tokens: int = 1_000_000
    batch_tokens: int = 4096
    micro_tokens: int = 2048
    held_rows: int = 16
    schedule: Schedule = field(default_factory=Schedule)
    dtype: str = "bfloat16"
    device: str = "auto"
    threads: int | None = None
    work: Path | None = None
    progress: bool = True


def check(wishes: Wishes) -> None:
    """Raises ConfigError, naming the flag, for what no teacher and no text could make possible."""
    schedule = wishes.schedule
    for flag, value, known in (
        ("--loss", schedule.loss, LOSSES),
        ("--mode", wishes.mode, MODES),
        ("--train", wishes.train, ("all", "layers")),
        ("--block-scales", wishes.block_scales, BLOCK_SCALES),
        ("--act", wishes.act, ("w4a4", "w4a16")),
        ("--dtype", wishes.dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise ConfigError(f"unknown value {value!r}; expected one of {', '.join(known)}", flag)
    for flag, number, least in (
        ("--seq", wishes.seq, 2),
        ("--tokens", wishes.tokens, 1),
        ("--held-rows", wishes.held_rows, 1),
        ("--batch-tokens", wishes.batch_tokens, wishes.seq),
        ("--micro-tokens", wishes.micro_tokens, wishes.seq),
        ("--synthesize", wishes.synthesize, 1),
        ("--stop", schedule.stop, 1),
        ("--warmup", schedule.warmup, 0),
        ("--eval-every", schedule.eval_every, 1),
        ("--threads", wishes.threads, 1),
    ):
        if number is not None and number < least:
            raise ConfigError(f"expected at least {least}, found {number}", flag)
    for flag, real, what in (
        ("--lr", schedule.lr, "a positive learning rate"),
        ("--clip", schedule.clip, "a positive norm"),
        ("--save-minutes", schedule.save_minutes, "a positive number of minutes"),
    ):
        if not (math.isfinite(real) and real > 0):
            raise ConfigError(f"expected {what}, found {real}", flag)
    if not 0 <= schedule.seed < SEEDS:
        raise ConfigError(f"expected 0 to {SEEDS - 1}, found {schedule.seed}", "--seed")
    if wishes.data is None and wishes.synthesize is None:
        raise ConfigError("there is nothing to train on: give a text, or --synthesize N", "--data")
    if wishes.mode == "blockwise":
        _check_blockwise(schedule)


def _check_blockwise(schedule: Schedule) -> None:
    if schedule.loss != "kl":
        raise ConfigError("--mode blockwise has a loss of its own; leave --loss out", "--mode")
    if schedule.stop is not None:
        raise ConfigError("--mode blockwise takes every step of every block; give fewer --tokens instead", "--stop")
    if schedule.checkpointing:
        raise ConfigError("--mode blockwise holds one block; leave --grad-checkpointing out", "--mode")


def identity(wishes: Wishes, schedule: Schedule, teacher: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change when it goes on. Raises ConfigError where a text cannot be read."""
    return {
        "teacher": fingerprint(Shards(teacher), config),
        "student": "start" if wishes.student is None else str(wishes.student.resolve()),
        "data": _digest(wishes.data, "--data"),
        "synthesize": wishes.synthesize,
        "held": [_digest(wishes.held, "--held"), wishes.held_rows],
        "seq": wishes.seq,
        "act": wishes.act,
        "mode": wishes.mode,
        "train": wishes.train,
        "dtype": wishes.dtype,
        "block_scales": wishes.block_scales,
        "schedule": asdict(replace(schedule, stop=None)),
    }


def _digest(source: str | None, flag: str) -> str | None:
    """What a file says; a dataset goes by its name."""
    if source is None or source.startswith("hf:"):
        return source
    try:
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"the text {source} cannot be read: {error}", flag) from error
