"""Measure grammar libraries: compile time, mask time and memory, on everyday and on hostile grammars.

    python -m nvfp4_runtime.structured.bench TOKENIZER.json [--library llguidance] [--json FILE]

Each case runs in a process of its own, which is ended after LIMIT_SECONDS. A walk takes up to 64 tokens, each drawn
from what the mask allows (seeded), so that masks are measured where generation would be. One thread, CPU time.

compile    from text to the first mask, which is when some libraries do their work
mask       mean and worst of the walk's masks; "32 rows": one mask for each of 32 requests, one after another
grown      peak resident memory over what the process had before compiling
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = ("llguidance", "xgrammar")
LIMIT_SECONDS = 30
WALK_TOKENS = 64
ROWS = 32

Accept = Callable[[int], bool]  # False: the text is complete


class _LLGuidance:
    """Ours: the same compiler the engine uses, with its limits."""

    def __init__(self, tokenizer: Path) -> None:
        from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
        from nvfp4_runtime.structured.worker import GrammarTrial

        raw = json.loads(tokenizer.read_text())
        size = 1 + max(*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"]))
        vocabulary = Vocabulary(size, (), tokenizer)
        self._compiler = GrammarCompiler(vocabulary, GrammarTrial(vocabulary))
        self._compiler.warm_up()

    def start(self, kind: Any, text: str) -> tuple[Callable[[], bytes], Accept]:
        import numpy as np

        from nvfp4_runtime.structured.spec import StructuredSpec

        spec = StructuredSpec(kind=kind, value=text)
        spec.validate()
        state = self._compiler.state(spec)
        words = np.zeros(state.num_words, dtype=np.int32)

        def fill() -> bytes:
            state.fill(words)
            if state.error:
                raise ValueError(state.error)
            return words.tobytes()

        def accept(token_id: int) -> bool:
            state.accept(token_id)
            if state.error:
                raise ValueError(state.error)
            return not state.complete

        return fill, accept


class _XGrammar:
    def __init__(self, tokenizer: Path) -> None:
        import tokenizers
        import xgrammar

        raw = tokenizers.Tokenizer.from_file(str(tokenizer))
        size = raw.get_vocab_size(with_added_tokens=True)
        vocabulary = [raw.id_to_token(i) or "" for i in range(size)]
        info = xgrammar.TokenizerInfo(
            vocabulary, vocab_type=xgrammar.VocabType.BYTE_LEVEL, vocab_size=size, stop_token_ids=[2]
        )
        self._library, self._size = xgrammar, size
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def start(self, kind: str, text: str) -> tuple[Callable[[], bytes], Accept]:
        make = {"json": "compile_json_schema", "regex": "compile_regex", "grammar": "compile_grammar"}[kind]
        matcher = self._library.GrammarMatcher(getattr(self._compiler, make)(text))
        bitmask = self._library.allocate_token_bitmask(1, self._size)

        def fill() -> bytes:
            matcher.fill_next_token_bitmask(bitmask)
            return bytes(bitmask.numpy().tobytes())

        def accept(token_id: int) -> bool:
            if not matcher.accept_token(token_id):
                raise ValueError("the matcher did not take its own token")
            return not matcher.is_terminated()

        return fill, accept


def measure(library: str, tokenizer: Path, kind: str, text: str) -> dict[str, Any]:
    """One case, in this process."""
    import numpy  # noqa: F401 - its import is nobody's compile time

    started = time.perf_counter()
    made: Any = _LLGuidance(tokenizer) if library == "llguidance" else _XGrammar(tokenizer)
    loaded = time.perf_counter() - started
    before = _peak_bytes()
    found: dict[str, Any] = {"load_seconds": loaded, "base_bytes": before}
    started = time.thread_time()
    try:
        fill, accept = made.start(kind, text)
        fill()
        found["compile_seconds"] = time.thread_time() - started
        found["masks"] = _walk(fill, accept)
        if found["masks"]:
            rows = [made.start(kind, text) for _ in range(ROWS)]
            for row, _ in rows:
                row()
            started = time.thread_time()
            for row, _ in rows:
                row()
            found["rows_seconds"] = time.thread_time() - started
    except Exception as error:  # noqa: BLE001 - any refusal of any library is a result
        found["refused"] = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        found.setdefault("compile_seconds", time.thread_time() - started)
    found["grown_bytes"] = _peak_bytes() - before
    return found


def _walk(fill: Callable[[], bytes], accept: Accept) -> list[float]:
    import numpy as np

    draw = random.Random(1)
    seconds = []
    for _ in range(WALK_TOKENS):
        started = time.thread_time()
        mask = fill()
        seconds.append(time.thread_time() - started)
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little"))
        if not len(allowed) or not accept(int(allowed[draw.randrange(len(allowed))])):
            break
    return seconds


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(library: str, tokenizer: Path, kind: str, text: str) -> dict[str, Any]:
    """One case in a child process, ended when it takes too long."""
    command = [sys.executable, "-m", __spec__.name, str(tokenizer), "--child", library, kind]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"died": f"ended after {LIMIT_SECONDS} s"}
    if done.returncode != 0:
        return {"died": f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(name: str, found: dict[str, Any]) -> str:
    if "died" in found:
        return f"| {name} | {found['died']} | | | | |"
    masks = found.get("masks") or []
    mean = f"{1e6 * sum(masks) / len(masks):.0f}" if masks else ""
    worst = f"{1e3 * max(masks):.2f}" if masks else ""
    rows = f"{1e3 * found['rows_seconds']:.2f}" if "rows_seconds" in found else ""
    compiled = f"{1e3 * found['compile_seconds']:.1f}"
    outcome = f" refused: {found['refused'][:60]}" if "refused" in found else ""
    return f"| {name} | {compiled}{outcome} | {mean} | {worst} | {rows} | {found['grown_bytes'] / 2**20:.0f} |"


def main() -> int:
    from nvfp4_runtime.structured.bench_cases import EVERYDAY, hostile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--library", action="append", choices=LIBRARIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], args.tokenizer, args.child[1], sys.stdin.read())))
        return 0
    results: dict[str, dict[str, Any]] = {}
    for library in args.library or LIBRARIES:
        print(f"\n{library}\n\n| grammar | compile ms | mask us | worst ms | 32 rows ms | grown MiB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        results[library] = {}
        for name, (kind, text) in (EVERYDAY | hostile()).items():
            found = results[library][name] = run(library, args.tokenizer, kind, text)
            print(row(name, found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
