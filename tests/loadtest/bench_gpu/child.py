"""A part of the benchmark for tests: behaves as its argument says."""

import json
import subprocess
import sys
import time


def say(**row: object) -> None:
    print(json.dumps({"part": "x"} | row), flush=True)


what = sys.argv[1]
say(value=1)
if what == "good":
    print("a library's greeting")
    print(json.dumps([1, 2]))
    say(value=2)
elif what == "fault":
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
    print('{"part": "x", "val', end="")
    sys.exit(3)
elif what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    say(pid=child.pid)
    time.sleep(600)
