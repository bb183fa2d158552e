"""What others use is told apart from what we use. CPU seconds are waited for, not assumed to pass with the clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest import neighbours
from loadtest.neighbours import Neighbours, _tree_ticks

TICKS = os.sysconf("SC_CLK_TCK")
CPU_SECONDS = 0.3
# /proc counts whole ticks, and each process of a tree (at most three here) may lose one per field.
SLACK_TICKS = 12
SPIN = f"import sys, time\nwhile time.process_time() < {CPU_SECONDS}: pass\nprint('spun', flush=True)\n"
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc on this system")


@needs_proc
def test_a_living_childs_work_and_an_ended_grandchilds_are_ours() -> None:
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPIN!r}], check=True)\n"
    for code in (SPIN, nested):
        before = _tree_ticks({os.getpid()})
        command = [sys.executable, "-c", code + "sys.stdin.read()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == b"spun\n"
            if code is nested:  # until the grandchild has been waited for
                while _children(process.pid):
                    time.sleep(0.01)
            used = _tree_ticks({os.getpid()}) - before
            process.stdin.close()
        assert used >= CPU_SECONDS * TICKS - SLACK_TICKS


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


@needs_proc
def test_work_outside_of_our_tree_is_the_neighbours() -> None:
    # A double fork: the spinning process outlives its parent and is no descendant of ours any more.
    orphan = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {SPIN!r}])"
    started = time.monotonic()
    counted = Neighbours()
    # run returns when the orphan, which has our pipe, has ended too
    done = subprocess.run([sys.executable, "-c", orphan], check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"spun\n"
    cores = counted.cores()
    assert cores is not None
    assert cores * (time.monotonic() - started) >= CPU_SECONDS - SLACK_TICKS / TICKS


def test_cores_are_busy_ticks_that_are_not_our_trees_over_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 2 s the machine was busy for 3 s, steal included; we, our child and its child were for 1 s of them."""
    us = os.getpid()

    def machine(busy: float, tree: float) -> None:
        third = round(tree * TICKS / 3)
        rest = round(busy * TICKS) - 2
        (tmp_path / "stat").write_text(f"cpu  {rest} 0 0 99999 99999 0 0 2 7 7\ncpu0 1 2 3\n")
        for pid, parent, ticks in ((us, 1, third), (90001, us, third), (90002, 90001, third), (90003, 1, 5555)):
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            fields = ["S", parent, *[0] * 9, ticks, 0, 0, 0, 99999]
            (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) " + " ".join(map(str, fields)))

    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(neighbours, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(neighbours, "Path", lambda path: tmp_path / path.removeprefix("/proc").lstrip("/"))
    machine(busy=10.0, tree=3.0)
    counted = Neighbours()
    clock.now = 52.0
    machine(busy=13.0, tree=4.0)
    # rounding to whole ticks: one per process of the tree and one of the machine, over 2 s
    assert counted.cores() == pytest.approx((3.0 - 1.0) / 2.0, abs=4 / TICKS / 2)
