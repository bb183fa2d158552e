"""`nvfp4 distill` in one call: teacher, text and a start become a trained NVFP4 folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.writer import check_place
from nvfp4_runtime.distill import distributed, state
from nvfp4_runtime.distill.blockwise import BlockResult, Blockwise
from nvfp4_runtime.distill.data import Rows, load_rows
from nvfp4_runtime.distill.export import export_student
from nvfp4_runtime.distill.hf import load_plain
from nvfp4_runtime.distill.plot import plot
from nvfp4_runtime.distill.student import Student, Train, build_student
from nvfp4_runtime.distill.trainer import Result, Schedule, Trainer
from nvfp4_runtime.distill.wishes import DTYPES, Wishes, check, identity
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.text.tokenizer import Tokenizer, read_json

logger = logging.getLogger(__name__)

DEFAULT_TEACHERS = ("default", "default-bf16")
START_WINDOWS = 16  # of 512 tokens: what the start is calibrated on

QAT_WARNING = (
    "--loss ce trains on the labels alone. On a model that was post-trained (instruction tuning, RL) this undoes "
    "post-training: its answers drift to the text's, and away from the model's own (docs/qad.md measures how far). Use "
    "--loss kl to keep the model"
)


@dataclass(frozen=True)
class Distilled:
    """What came of it; `work` holds log.csv, eval.csv and their plot, or blocks.csv where there are `blocks`."""

    out: Path
    work: Path
    result: Result | None
    blocks: Sequence[BlockResult] = ()


def distill(teacher: str | Path, out: str | Path, wishes: Wishes) -> Distilled:
    """Train an NVFP4 student of the plain model `teacher` on text, and write the best step as the folder `out`.

    Interrupted, it leaves `OUT.training`, from which the same call goes on. Raises ConfigError, CheckpointError,
    Interrupted.
    """
    check(wishes)
    device = distributed.start() or _device(wishes.device)
    if wishes.threads is not None:
        torch.set_num_threads(wishes.threads)
    out = check_place(Path(out), None if str(teacher) in DEFAULT_TEACHERS else Path(teacher))
    work = wishes.work or out.with_name(f"{out.name}.training")
    folder = teacher_folder(teacher, wishes.progress)
    schedule = _schedule(wishes)
    with _claimed(work, wishes, schedule, folder):
        return _distill(folder, out, work, wishes, schedule, device)


def _distill(
    folder: Path, out: Path, work: Path, wishes: Wishes, schedule: Schedule, device: torch.device
) -> Distilled:
    rows, held = _rows(wishes, folder, work)
    if schedule.loss == "ce":
        logger.warning(QAT_WARNING)
    start = wishes.student or _start(folder, work, wishes, rows)
    logger.info(
        "training on %d rows of %d tokens for %d steps of %d tokens, held out: %d rows",
        len(rows), rows.length, schedule.steps, schedule.batch_rows * rows.length, len(held),
    )  # fmt: skip
    if wishes.mode == "blockwise":
        return _blockwise(folder, start, out, work, rows, held, schedule, wishes, device)
    train: Train = "scales" if wishes.mode == "scales" else wishes.train
    dtype = DTYPES[wishes.dtype]
    student = build_student(
        folder, start, wishes.act, dtype=dtype, device=device, block_scales=wishes.block_scales, train=train
    )
    if (before := _masters_before(wishes)) is not None:
        load_masters(student, before)
        logger.info("going on from the float32 weights in %s", before)
    plain = load_plain(folder, dtype, device)
    trainer = Trainer(plain, student, rows, held, schedule, work, progress=wishes.progress)
    result = trainer.run()
    if distributed.rank() == 0:
        load_masters(student, work / state.BEST)
        export_student(student, out)
        if result.steps == schedule.steps:  # else the same command without --stop goes on
            shutil.rmtree(work / "checkpoint", ignore_errors=True)
        plot(work)
    return Distilled(out, work, result)


def _blockwise(
    folder: Path,
    start: Path,
    out: Path,
    work: Path,
    rows: Rows,
    held: Rows,
    schedule: Schedule,
    wishes: Wishes,
    device: torch.device,
) -> Distilled:
    """Every block on the same rows: as many as one pass of the schedule sees, at most."""
    if distributed.world() > 1:
        raise ConfigError("--mode blockwise runs in one process; start it without torchrun", "--mode")
    rows = rows.first(schedule.steps * schedule.batch_rows)
    run = Blockwise(
        folder, start, wishes.act, rows, held, schedule, work,
        device=device, block_scales=wishes.block_scales, dtype=DTYPES[wishes.dtype],
        progress=wishes.progress,
    )  # fmt: skip
    results = run.run()
    run.export(out)
    return Distilled(out, work, None, results)


def load_masters(student: Student, path: Path) -> None:
    """Float32 masters that a run wrote. Raises ConfigError where they are another student's."""
    found = load_file(path)
    if missing := sorted(name for name in student.masters if name not in found):
        raise ConfigError(
            f"{path} lacks {len(missing)} tensor(s) that are to be trained, e.g. {missing[0]}: it was "
            "made with another --train or --mode; use that, or move the file away to start from the rounded weights",
            "--student",
        )
    with torch.no_grad():
        for name, master in student.masters.items():
            master.copy_(found[name])
    student.refresh()


def _masters_before(wishes: Wishes) -> Path | None:
    """What an earlier distillation left beside the student that it made."""
    if wishes.student is None or wishes.mode == "blockwise":
        return None
    path = wishes.student.with_name(f"{wishes.student.name}.training") / state.BEST
    return path if path.is_file() else None


def teacher_folder(teacher: str | Path, progress: bool) -> Path:
    """The plain model's folder; "default" is the embedded default model's parent."""
    if str(teacher) in DEFAULT_TEACHERS:
        from nvfp4_runtime.quantize.default_model import default_bf16

        return default_bf16(progress)
    folder = Path(teacher)
    if not folder.is_dir():
        raise ConfigError(f"{teacher} is no folder; expected a plain Hugging Face model, or `default`", "TEACHER")
    return folder


@contextmanager
def _claimed(work: Path, wishes: Wishes, schedule: Schedule, teacher: Path) -> Iterator[None]:
    """`work` is this run's and nobody else's while it lasts. Raises ConfigError where it is another's."""
    if distributed.rank() != 0:
        yield
        return
    config = _read_config(teacher)
    if isinstance(most := config.get("max_position_embeddings"), int) and wishes.seq > most:
        raise ConfigError(f"rows of {wishes.seq} tokens are longer than the {most} positions the teacher has", "--seq")
    run = identity(wishes, schedule, teacher, config)
    with ExitStack() as lock:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.enter_context(state.locked(work))
            state.claim(work, run)
        except OSError as error:
            raise ConfigError(f"{work} cannot be written: {error}", "OUT") from error
        yield


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a plain teacher."""
    config = read_json(folder / "config.json")
    if not config:
        raise ConfigError(f"{folder} has no config.json; expected a plain Hugging Face model", "TEACHER")
    if (folder / "hf_quant_config.json").exists() or config.get("quantization_config") is not None:
        raise ConfigError(f"{folder} is quantised; expected the plain model that it was made from", "TEACHER")
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("this torch sees no CUDA device; leave --device out to train on the CPU", "--device")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: {error}", "--device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{name!r} is no device to train on; expected cpu, cuda or cuda:N", "--device")
    return device


def _rows(wishes: Wishes, folder: Path, work: Path) -> tuple[Rows, Rows]:
    source = wishes.data
    if wishes.synthesize is not None:
        source = str(work / "synthesized.jsonl")
        if distributed.rank() == 0:
            from nvfp4_runtime.distill.synthesize import read_prompts, synthesize

            prompts = [] if wishes.data is None else read_prompts(wishes.data)
            seed = wishes.schedule.seed
            synthesize(folder, wishes.synthesize, Path(source), prompts=prompts, seed=seed, threads=wishes.threads)
        distributed.wait()
    assert source is not None  # check() looked
    rows = load_rows(source, folder, wishes.seq)
    if wishes.held is not None:
        return rows, load_rows(wishes.held, folder, wishes.seq, "--held").first(wishes.held_rows)
    if len(rows) < 2 * wishes.held_rows:
        raise ConfigError(
            f"the text has {len(rows)} rows of {wishes.seq} tokens, too few to hold {wishes.held_rows} out; give more "
            "text, a text of its own (--held), or fewer --held-rows",
            "--data",
        )
    return rows.split(wishes.held_rows)


def _schedule(wishes: Wishes) -> Schedule:
    batch_rows = max(1, wishes.batch_tokens // wishes.seq)
    world = distributed.world()
    if batch_rows % world:
        raise ConfigError(
            f"a step has {batch_rows} rows, which {world} processes cannot share evenly", "--batch-tokens"
        )
    steps = -(-wishes.tokens // (batch_rows * wishes.seq))
    micro_rows = min(batch_rows, max(1, wishes.micro_tokens // wishes.seq))
    return replace(wishes.schedule, steps=steps, batch_rows=batch_rows, micro_rows=micro_rows)


def _start(folder: Path, work: Path, wishes: Wishes, rows: Rows) -> Path:
    """The student's beginning: AWQ for the arithmetic that is trained, made once."""
    start = work / "start"
    if not start.is_dir() and distributed.rank() == 0:
        tokens = rows.ids[: START_WINDOWS * 512 // rows.length + 1].flatten().tolist()
        text = Tokenizer.load(folder).decode(tokens)
        logger.info("no --student given: quantising the teacher by AWQ first")
        try:
            quantize_folder(
                folder, start, method="awq", calib_texts=[text], calib_windows=START_WINDOWS, numerics=wishes.act,
                progress=wishes.progress,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"AWQ, which the student starts from, refuses: {error}", "--student") from error
    distributed.wait()
    return start
