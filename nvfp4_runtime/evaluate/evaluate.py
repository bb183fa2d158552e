"""`nvfp4 eval` in one call: windows of text through one or more students, side by side with a teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvfp4_runtime import __version__
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.engine.plan import available_memory_bytes
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate.divergence import RESAMPLES, Floats, Interval, Ints, Rows, forward_kl, percentiles
from nvfp4_runtime.evaluate.report import Divergence, Measured, Report, Worst
from nvfp4_runtime.evaluate.scorer import Scorer, Side
from nvfp4_runtime.evaluate.teacher import LiveTeacher, StoredTeacher, Teacher
from nvfp4_runtime.evaluate.windows import Windows
from nvfp4_runtime.text.tokenizer import Tokenizer

DEFAULT_WORST = 10
CONTEXT_TOKENS = 16
MEMORY_MARGIN = 1.25  # loading takes more than the files hold: packed copies, KV cache, logits
INTERVALS = (
    f"[low, high]: 95 % by bootstrap over whole windows, {RESAMPLES:,} resamples, seed 0. They tell how far other text "
    "might move a figure; models on the same windows move together, so compare those by their differences."
)


def evaluate(
    students: Sequence[Side],
    windows: Windows,
    tokenizer: Tokenizer,
    teacher: Side | None = None,
    *,
    two_pass: bool | None = None,
    scratch: Path | None = None,
    worst: int = DEFAULT_WORST,
    progress: bool = False,
) -> Report:
    """Perplexity of every student on `windows`, and how far each is from the teacher.

    tokenizer  made the windows, and puts positions into words
    two_pass   True: the teacher runs first, alone, and its log-probabilities wait in a file in `scratch`; then each
               student runs alone. False: all are loaded together. None: together if memory seems to allow it. The
               figures are the same bits either way
    worst      how many positions to show where a student differs most

    Raises ConfigError, CheckpointError, KernelError.
    """
    notes: list[str] = []
    if teacher is not None and two_pass is None and (two_pass := _too_large([teacher, *students])):
        notes.append("too large to be loaded together: the teacher ran first, then each student (two passes)")
    total = windows.num_scored * (len(students) + bool(two_pass))
    with tqdm(desc="evaluate", total=total, unit="tok", disable=not progress) as bar:
        run = _Run(windows, tokenizer, worst, bar)
        of_teacher: Measured | None = None
        if teacher is None:
            measured = [run.alone(side) for side in students]
        elif two_pass:
            of_teacher, measured = run.two_pass(teacher, students, scratch or Path(tempfile.gettempdir()))
        else:
            of_teacher, measured = run.together(teacher, students)
    return Report(
        version=__version__,
        protocol=windows.protocol,
        intervals=INTERVALS,
        text=windows.source,
        text_sha256=windows.sha256,
        text_tokens=windows.num_tokens,
        window=windows.size,
        num_windows=len(windows.ids),
        num_scored=windows.num_scored,
        teacher=of_teacher,
        students=measured,
        notes=notes,
    )


@dataclass
class Positions:
    """One model's figures at every scored position, gathered piece by piece. `kl`: to the teacher, if there is one."""

    nll: list[Floats] = field(default_factory=list)
    top: list[Ints] = field(default_factory=list)
    top_prob: list[Floats] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)

    def take(self, rows: Rows) -> None:
        self.nll.append(rows.nll)
        self.top.append(rows.top)
        self.top_prob.append(rows.top_prob)


@dataclass
class _Run:
    """What all models of one evaluation share. At most two models' logits of one piece are in memory."""

    windows: Windows
    tokenizer: Tokenizer
    worst: int
    bar: tqdm

    def alone(self, side: Side) -> Measured:
        scorer, found = Scorer(side, self.windows), Positions()
        for tokens, start, stop in self._pieces(scorer.chunk):
            found.take(scorer.rows(tokens, start, stop))
            self.bar.update(stop - start)
        return self._measured(scorer, found)

    def together(self, side: Side, students: Sequence[Side]) -> tuple[Measured, list[Measured]]:
        leader = Scorer(side, self.windows)
        scorers = [Scorer(student, self.windows) for student in students]
        taught, found = self._side_by_side(LiveTeacher(leader), leader.info.vocab_size, scorers)
        pairs = zip(scorers, found, strict=True)
        return self._measured(leader, taught), [self._compared(scorer, one, taught) for scorer, one in pairs]

    def two_pass(self, side: Side, students: Sequence[Side], scratch: Path) -> tuple[Measured, list[Measured]]:
        leader, taught = Scorer(side, self.windows), Positions()
        vocab_size, measured = leader.info.vocab_size, []
        with closing(StoredTeacher(self.windows.num_scored, vocab_size, scratch)) as stored:
            for tokens, start, stop in self._pieces(leader.chunk):
                rows = leader.rows(tokens, start, stop)
                taught.take(rows)
                stored.store(rows)
                self.bar.update(stop - start)
            of_teacher = self._measured(leader, taught)
            del leader  # its weights make room for the first student's
            for student in students:
                scorer = Scorer(student, self.windows)
                stored.rewind()
                _, (found,) = self._side_by_side(stored, vocab_size, [scorer])
                measured.append(self._compared(scorer, found, taught))
                del scorer
        return of_teacher, measured

    def _side_by_side(
        self, teacher: Teacher, vocab_size: int, scorers: Sequence[Scorer]
    ) -> tuple[Positions, list[Positions]]:
        """Every piece through the teacher once and through each student."""
        for scorer in scorers:
            if scorer.info.vocab_size != vocab_size:
                raise ConfigError(
                    f"the teacher has {vocab_size} tokens and {scorer.side.folder} has {scorer.info.vocab_size}; KL "
                    "compares distributions over one vocabulary: give the model that this one was made from",
                    "--teacher",
                )
        taught, found = Positions(), [Positions() for _ in scorers]
        for tokens, start, stop in self._pieces(scorers[0].chunk):
            expected = teacher.rows(tokens, start, stop)
            taught.take(expected)
            for scorer, one in zip(scorers, found, strict=True):
                rows = scorer.rows(tokens, start, stop)
                one.take(rows)
                one.kl.append(forward_kl(expected, rows))
                self.bar.update(stop - start)
        return taught, found

    def _pieces(self, chunk: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """(window, start, stop) in order: up to `chunk` tokens, each with a successor in its window."""
        last = self.windows.size - 1
        for tokens in self.windows.ids:
            for start in range(0, last, chunk):
                yield tokens, start, min(start + chunk, last)

    def _measured(self, scorer: Scorer, found: Positions, divergence: Divergence | None = None) -> Measured:
        info = scorer.info
        nll = Interval.over(np.concatenate(found.nll), len(self.windows.ids))
        kernels = {
            f"{layers.stored} -> {layers.backend} {layers.numerics}" for layers in info.layers if layers.num_bytes
        }
        return Measured(
            model=scorer.side.folder.name,
            numerics=info.numerics,
            numerics_reason=info.numerics_reason,
            dtype=info.dtype,
            kv_dtype=info.kv_dtype,
            weight_bytes=info.weight_bytes,
            kernels=sorted(kernels),
            nll=nll,
            perplexity=nll.exp(),
            seconds=scorer.seconds,
            tokens_per_second=self.windows.num_scored / scorer.seconds,
            divergence=divergence,
        )

    def _compared(self, scorer: Scorer, found: Positions, taught: Positions) -> Measured:
        count = len(self.windows.ids)
        kl = np.concatenate(found.kl)
        same = np.concatenate(found.top) == np.concatenate(taught.top)
        difference = np.concatenate(found.nll) - np.concatenate(taught.nll)
        divergence = Divergence(
            kl=Interval.over(kl, count),
            kl_percentiles=percentiles(kl),
            kl_by_window=kl.reshape(count, -1).mean(axis=1).tolist(),
            nll_difference=Interval.over(difference, count),
            top1_agreement=Interval.over(same.astype(np.float64), count),
            worst=[self._in_words(int(i), kl, found, taught) for i in np.argsort(-kl, kind="stable")[: self.worst]],
        )
        return self._measured(scorer, found, divergence)

    def _in_words(self, index: int, kl: Floats, found: Positions, taught: Positions) -> Worst:
        window, offset = divmod(index, self.windows.size - 1)
        tokens = self.windows.ids[window]
        context = tokens[max(0, offset + 1 - CONTEXT_TOKENS) : offset + 1]
        ours, theirs = np.concatenate(found.top)[index], np.concatenate(taught.top)[index]
        return Worst(
            kl=float(kl[index]),
            window=window,
            position=offset + 1,
            context=self.tokenizer.decode(context, skip_special_tokens=False),
            token=self.tokenizer.token_text(tokens[offset + 1]),
            teacher_token=self.tokenizer.token_text(int(theirs)),
            teacher_prob=float(np.concatenate(taught.top_prob)[index]),
            student_token=self.tokenizer.token_text(int(ours)),
            student_prob=float(np.concatenate(found.top_prob)[index]),
        )


def _too_large(sides: Sequence[Side]) -> bool:
    """Whether the sides' files together, and what loading adds, exceed the free memory."""
    needed = sum(info.nbytes for side in sides for info in Shards(side.folder))
    return needed * MEMORY_MARGIN > available_memory_bytes()
