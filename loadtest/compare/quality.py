"""Perplexity, KL divergence and top-1 agreement through `nvfp4 eval`, so that no row of speed stands alone."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from loadtest.compare.report import Estimate, Quality
from loadtest.compare.sides import SIMULATED, Candidate
from loadtest.server_process import nvfp4_program


@dataclass(frozen=True)
class Task:
    """What is predicted, and whom KL is measured to; teacher None: perplexity alone."""

    text: Path
    windows: int
    window: int
    teacher: str | None


def quality(candidate: Candidate, task: Task | None) -> Quality:
    """RuntimeError when `nvfp4 eval` fails."""
    if candidate.url is not None:
        return Quality("not measured: we have no files of a foreign server's model")
    if SIMULATED in candidate.flags:
        return Quality("not measured: a simulated engine has none")
    if task is None:
        return Quality("not measured: give --quality-text")
    command = [nvfp4_program(), "eval", candidate.model, "--text", str(task.text), "--json", "--worst", "0"]
    command += ["--windows", str(task.windows), "--window", str(task.window), *candidate.eval_flags]
    teaches_itself = task.teacher == candidate.model
    if task.teacher is not None and not teaches_itself:
        command += ["--teacher", task.teacher]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return from_evaluation(json.loads(done.stdout), teaches_itself)


def from_evaluation(report: dict[str, object], teaches_itself: bool) -> Quality:
    """The first student of an evaluation's JSON."""
    students = report["students"]
    assert isinstance(students, list)
    student = students[0]
    note = (
        f"{report['num_scored']} positions of {report['text']} in {report['num_windows']} windows of "
        f"{report['window']} tokens"
    )
    perplexity = Estimate(**student["perplexity"])
    if teaches_itself:
        return Quality(f"{note}; the others are compared with it", perplexity, Estimate(0.0), Estimate(1.0))
    found = student.get("divergence")
    if found is None:
        return Quality(note, perplexity)
    return Quality(note, perplexity, Estimate(**found["kl"]), Estimate(**found["top1_agreement"]))
