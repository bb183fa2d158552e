"""What others use is told apart from what we use."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from loadtest.neighbours import Neighbours, _tree_ticks

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc on this system")
SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def ticks_during(command: list[str], seconds: float) -> int:
    before = _tree_ticks(os.getpid())
    process = subprocess.Popen(command)
    time.sleep(seconds)
    used = _tree_ticks(os.getpid()) - before
    process.kill()
    process.wait()
    return used


def test_a_childs_work_and_a_grandchilds_are_ours():
    spin = SPIN.format(2)
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    for code in (spin, nested):
        # 1 s on a machine that may be shared by many: at least 5 % of a core arrives, and a sleeper uses next to none.
        assert ticks_during([sys.executable, "-c", code], 1.0) > 0.05 * os.sysconf("SC_CLK_TCK")


def test_work_outside_of_our_tree_is_the_neighbours():
    # A double fork: the spinning process outlives its parent and is no descendant of ours any more.
    orphan = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {SPIN.format(1.5)!r}])"
    neighbours = Neighbours()
    subprocess.run([sys.executable, "-c", orphan], check=True)
    time.sleep(1.5)
    cores = neighbours.cores()
    assert cores is not None
    assert 0.05 < cores <= os.cpu_count()
