"""The loop: rows of text through teacher and student, their distance back through the student, masters a step on."""

from __future__ import annotations

import csv
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvfp4_runtime.distill import distributed, state
from nvfp4_runtime.distill.data import Rows, indices
from nvfp4_runtime.distill.hf import head_weight, hidden_states
from nvfp4_runtime.distill.loss import Loss, Sums, chunked_loss
from nvfp4_runtime.distill.student import Student
from nvfp4_runtime.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

LOG_FIELDS = ("step", "tokens", "lr", "loss", "kl", "ce", "teacher_ce", "top1", "grad_norm", "seconds")
_LOGS = ("log.csv", "eval.csv")
EVAL_FIELDS = ("step", "tokens", "kl", "ce", "teacher_ce", "top1", "seconds")


@dataclass(frozen=True)
class Schedule:
    """How to learn.

    steps       optimizer steps, of `batch_rows` rows each, `micro_rows` at a time
    stop        the step to end after, on the way of a schedule for all `steps`; None: the last
    lr          reached after `warmup` steps, then a cosine down to lr * `final`
    eval_every  steps between measurements on the held-out rows; save_minutes between checkpoints
    """

    loss: Loss = "kl"
    steps: int = 100
    stop: int | None = None
    batch_rows: int = 4
    micro_rows: int = 2
    lr: float = 1e-5
    final: float = 0.1
    warmup: int = 10
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    seed: int = 0
    eval_every: int = 25
    save_minutes: float = 10.0
    checkpointing: bool = False

    def lr_at(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Result:
    """first, best and last hold the held-out figures before training, of the best step, and at the end."""

    first: dict[str, float]
    best: dict[str, float]
    last: dict[str, float]
    best_step: int
    steps: int
    tokens: int
    seconds: float


class Interrupted(Exception):
    """A signal asked the run to end; what it had reached is saved."""


class Trainer:
    """One run in the folder `work`, which is all it needs to go on after it was killed."""

    def __init__(
        self,
        teacher: nn.Module | None,
        student: Student,
        rows: Rows,
        held: Rows,
        schedule: Schedule,
        work: Path,
        *,
        progress: bool = True,
    ) -> None:
        self.teacher, self.student, self.rows, self.held = teacher, student, rows, held
        self.schedule, self.work, self.progress = schedule, work, progress
        self.device = next(student.model.parameters()).device
        self.student_head = head_weight(student.model)
        self.teacher_head = None if teacher is None else head_weight(teacher)
        masters = list(student.trainable())
        self.optimizer = torch.optim.AdamW(
            masters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True
        )
        self.identity = {"schedule": asdict(replace(schedule, stop=None)), "rows": rows.sha256, "held": held.sha256}
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._held_teacher: list[Tensor | None] | None = None
        if schedule.checkpointing:
            student.model.gradient_checkpointing_enable()  # type: ignore[operator]  # transformers' modules have it
            student.model.train()

    def run(self) -> Result:
        """Train to the end, from where an earlier run of the same identity was. Interrupted on SIGTERM, SIGINT."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._resume()
        started, before = time.perf_counter(), self.seconds
        saved = started
        end = min(self.schedule.stop or self.schedule.steps, self.schedule.steps)
        if self.step > end:
            raise ConfigError(
                f"the run is after step {self.step} already; expected at least that, found {end}", "--stop"
            )
        if not self.history or (self.step == end and self.history[-1]["step"] != end):
            self._evaluate()
        bar = tqdm(
            total=end,
            initial=self.step,
            desc="distil",
            unit="step",
            disable=not self._speaks,
            smoothing=0.1,
        )
        with bar, _signals() as asked:
            while self.step < end:
                row = self._one_step()
                if not math.isfinite(row["loss"]):
                    raise ConfigError(diverged("the loss", row["loss"], self.step), "--lr")
                self.seconds = before + time.perf_counter() - started
                self._log(row)
                bar.set_postfix(kl=f"{row['kl']:.4f}", ce=f"{row['ce']:.3f}", tps=f"{row['tokens_per_second']:.0f}")
                bar.update(1)
                last = self.step == end
                if last or self.step % self.schedule.eval_every == 0:
                    self._evaluate()
                late = time.perf_counter() - saved > 60 * self.schedule.save_minutes
                if last or late or asked:
                    self._save()
                    saved = time.perf_counter()
                if asked and not last:
                    raise Interrupted(
                        f"stopped after step {self.step} of {self.schedule.steps}; the same command goes on"
                    )
        best = min(self.history, key=lambda each: each[self._criterion])
        return Result(self.history[0], best, self.history[-1], int(best["step"]), self.step, self._tokens, self.seconds)

    @property
    def _speaks(self) -> bool:
        return self.progress and distributed.rank() == 0

    @property
    def _tokens(self) -> int:
        return self.step * self.schedule.batch_rows * self.rows.length

    @property
    def _criterion(self) -> str:
        """What decides which step was best: the distance to the teacher; of what learns labels (QAT), theirs."""
        return "ce" if self.teacher is None or self.schedule.loss == "ce" else "kl"

    def _one_step(self) -> dict[str, float]:
        schedule, begun = self.schedule, time.perf_counter()
        chosen = indices(self.step * schedule.batch_rows, schedule.batch_rows, len(self.rows), schedule.seed)
        mine = chosen[distributed.rank() :: distributed.world()]
        sums = Sums()
        self.student.zero_grad()
        total = torch.zeros(())
        for start in range(0, len(mine), schedule.micro_rows):
            ids = self.rows.batch(mine[start : start + schedule.micro_rows], self.device)
            loss = self._loss(ids, sums) / self._positions(schedule.batch_rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().cpu()
        masters = list(self.student.trainable())
        distributed.add_up([m.grad for m in masters if m.grad is not None])
        norm = nn.utils.clip_grad_norm_(masters, schedule.clip)
        lr = schedule.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.student.refresh()
        self.step += 1
        spent = time.perf_counter() - begun
        return {
            "step": self.step,
            "tokens": self._tokens,
            "lr": lr,
            "loss": float(total),
            **sums.means(),
            "grad_norm": float(norm),
            "seconds": self.seconds,
            "tokens_per_second": schedule.batch_rows * self.rows.length / spent,
        }

    def _positions(self, rows: int) -> int:
        per_row = self.rows.length - (1 if self.schedule.loss == "ce" else 0)
        return rows * per_row

    def _loss(self, ids: Tensor, sums: Sums, teacher_hidden: Tensor | None = None) -> Tensor:
        """The summed loss over rows [B, T]."""
        if teacher_hidden is None and self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = hidden_states(self.teacher, ids)
        hidden = hidden_states(self.student.model, ids)
        return chunked_loss(
            self.schedule.loss, hidden, self.student_head, teacher_hidden, self.teacher_head, labels_of(ids), sums
        )

    def _evaluate(self) -> None:
        sums = Sums()
        if self._held_teacher is None:
            self._held_teacher = [None] * len(self.held)
        with torch.no_grad():
            for i in range(len(self.held)):
                ids = self.held.batch([i], self.device)
                if self._held_teacher[i] is None and self.teacher is not None:
                    self._held_teacher[i] = hidden_states(self.teacher, ids)
                self._loss(ids, sums, self._held_teacher[i])
        figures = {"step": self.step, "tokens": self._tokens, **sums.means(), "seconds": self.seconds}
        if not math.isfinite(reached := figures[self._criterion]):
            if self.step:
                raise ConfigError(diverged("the held-out loss", reached, self.step), "--lr")
            raise CheckpointError(not_finite("the held-out loss", reached))
        best = min((each[self._criterion] for each in self.history), default=math.inf)
        self.history.append(figures)
        if distributed.rank() == 0:
            _append(self.work / "eval.csv", EVAL_FIELDS, figures)
            if reached < best:
                state.write_tensors(self.work / state.BEST, self.student.masters)
        if self._speaks:
            tqdm.write(
                f"step {self.step}: held-out KL {figures['kl']:.4f}, CE {figures['ce']:.4f}, "
                f"same top token {figures['top1']:.4f}"
            )

    def _log(self, row: dict[str, float]) -> None:
        if distributed.rank() == 0:
            _append(self.work / "log.csv", LOG_FIELDS, row)

    def _save(self) -> None:
        if distributed.rank() == 0:
            names = list(self.student.masters)
            moments = {
                f"{kind}.{name}": self.optimizer.state[self.student.masters[name]][kind]
                for name in names
                for kind in ("exp_avg", "exp_avg_sq")
            }
            record = {"identity": self.identity, "step": self.step, "seconds": self.seconds, "history": self.history}
            state.save(self.work, self.student.masters, moments, record)

    def _resume(self) -> None:
        loaded = state.load(self.work, self.identity)
        if loaded is None:
            if distributed.rank() == 0:
                for name in _LOGS:  # of a run that ended, or was killed before its first checkpoint
                    (self.work / name).unlink(missing_ok=True)
            return
        for name, master in self.student.masters.items():
            with torch.no_grad():
                master.copy_(loaded.tensors[name])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(loaded.record["step"])),
                **{kind: loaded.tensors[f"{kind}.{name}"].to(master.device) for kind in ("exp_avg", "exp_avg_sq")},
            }
        self.student.refresh()
        self.step, self.seconds = int(loaded.record["step"]), float(loaded.record["seconds"])
        self.history = list(loaded.record["history"])
        if distributed.rank() == 0:
            for name in _LOGS:
                _cut(self.work / name, self.step)
        logger.info("going on after step %d", self.step)


def diverged(what: str, value: float, step: int) -> str:
    return f"{what} is {value} after step {step}: the training diverges; give a lower rate, or a longer --warmup"


def not_finite(what: str, value: float) -> str:
    return f"{what} is {value} before any training: the teacher or the student holds values that are not finite"


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module, rows: Rows) -> dict[str, float]:
    """KL to the teacher, label losses and same top tokens over all rows."""
    sums, device = Sums(), next(student.parameters()).device
    for i in range(len(rows)):
        ids = rows.batch([i], device)
        hidden, teacher_hidden = hidden_states(student, ids), hidden_states(teacher, ids)
        chunked_loss("kl", hidden, head_weight(student), teacher_hidden, head_weight(teacher), labels_of(ids), sums)
    return sums.means()


def labels_of(ids: Tensor) -> Tensor:
    """The next token of each position of rows [B, T], flat; -1 for the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()


def _append(path: Path, fields: tuple[str, ...], row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{row[name]:.8g}" for name in fields})


def _cut(path: Path, step: int) -> None:
    """Drop lines after `step`: an interrupted run wrote them after its last checkpoint."""
    if path.exists():
        head, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        kept = [line for line in lines if (number := line.split(",")[0]).isdecimal() and int(number) <= step]
        path.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT is noted, so that the step in hand ends and is saved; a second one acts at once."""
    asked = list[int]()
    old = dict[int, Any]()

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for each, handler in old.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            old[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: no signals come here
        old.clear()
    try:
        yield asked
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
