"""What the whole server costs: seconds from exec to ready, and memory of all its processes."""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtest.client import complete_together
from loadtest.server_process import Server, nvfp4_server

KV_BYTES = 256 << 20
ALLOWED_BESIDE = 600_000_000  # of everything that is neither checkpoint nor KV cache
START_SECONDS = 2.5


@dataclass(frozen=True)
class ServerFigures:
    """start_seconds of every start; PSS in bytes by process name, after loading and after work."""

    start_seconds: list[float]
    phases: dict[str, float]
    pss_loaded: dict[str, int]
    pss_worked: dict[str, int]
    checkpoint_bytes: int

    @property
    def start_median(self) -> float:
        return statistics.median(self.start_seconds)

    @property
    def pss_allowed(self) -> int:
        return self.checkpoint_bytes + KV_BYTES + ALLOWED_BESIDE

    @property
    def pss_highest(self) -> int:
        return max(sum(self.pss_loaded.values()), sum(self.pss_worked.values()))


def measure_server(folder: Path, threads: int, starts: int, scratch: Path) -> ServerFigures:
    """Start the server on `folder` `starts` times from a warm page cache; the last one is given work."""
    arguments = [str(folder), "--threads", str(threads), "--kv-cache-memory", str(KV_BYTES), "--no-prefix-caching"]
    seconds: list[float] = []
    log = scratch / "server.log"
    for _ in range(starts):  # one more than is counted: the first also warms what is not the checkpoint
        warm(folder / "model.safetensors")
        with nvfp4_server(arguments, {}, 120, log) as server:
            seconds.append(server.ready_seconds)
    warm(folder / "model.safetensors")
    with nvfp4_server(arguments, {}, 120, log) as server:
        seconds.append(server.ready_seconds)
        loaded = pss_by_process(server.pid)
        asyncio.run(_work(server))
        worked = pss_by_process(server.pid)
        phases = startup_phases(server.url)
    size = (folder / "model.safetensors").stat().st_size
    return ServerFigures(seconds[1:], phases, loaded, worked, size)


def warm(path: Path) -> None:
    """Read a file into the page cache: some systems drop what has been idle for a minute."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


async def _work(server: Server) -> None:
    """Eight streams, of which two have long prompts: what serving touches that loading does not."""
    rng = random.Random(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        prompts = [rng.choices(range(300, 30000), k=512 if i < 2 else 32) for i in range(8)]
        await complete_together(client, model, prompts, 32)


def startup_phases(url: str) -> dict[str, float]:
    """Seconds by phase as the server's metrics tell them."""
    phases = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("nvfp4_startup_seconds{"):
            labels, _, value = line.rpartition(" ")
            phases[labels.partition('phase="')[2].partition('"')[0]] = float(value)
    return phases


def pss_by_process(root: int) -> dict[str, int]:
    """Bytes of memory of `root` and each descendant, shared pages divided by who shares them; keys "pid name"."""
    found = {}
    for pid in process_tree(root):
        folder = Path("/proc") / str(pid)
        try:
            program, *arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            name = " ".join([Path(program).name, *(Path(a).name for a in arguments)]).strip()  # no folders
            rollup = (folder / "smaps_rollup").read_text()
        except OSError:
            continue  # it ended meanwhile
        if name:
            found[f"{pid} {name[-60:]}"] = pss_of(rollup)
    return found


def pss_of(rollup: str) -> int:
    """Bytes from the "Pss:" line of a smaps_rollup; ValueError when there is none."""
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Pss line in smaps_rollup")


def process_tree(root: int) -> list[int]:
    """`root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    tree, todo = [], [root]
    while todo:
        tree.append(pid := todo.pop())
        todo += children.get(pid, [])
    return tree
