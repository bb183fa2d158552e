"""llama.cpp through the package llama-cpp-python (extra `peers`), doing what llama.cpp's own benchmark programs do.

    python -m loadtest.bench_cpu.llama_cpp_worker measure GGUF THREADS LEG TOKENS BATCH PROMPT_TOKENS
    python -m loadtest.bench_cpu.llama_cpp_worker quantize FROM TO Q4_0|Q4_K_M THREADS

`measure` prints one JSON line with tokens_per_second: as llama-bench for one sequence (an empty context, one warm-up)
and as llama-batched-bench for several (a prompt each first). Random tokens; nothing is sampled, as in those programs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}  # llama.h: enum llama_ftype
PHYSICAL_BATCH = 512


class Context:
    """A loaded GGUF. Not to be used after an error; the process ends then."""

    def __init__(self, gguf: str, threads: int, length: int, sequences: int) -> None:
        self._api = llama_api()
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(gguf.encode(), self._api.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length, sequences
        params.n_batch = params.n_ubatch = PHYSICAL_BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {length} tokens for {gguf}")
        self._vocab = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._random = random.Random(0)

    def decode(self, entries: list[tuple[int, int, bool]]) -> None:
        """Compute one token per (position, sequence, whether its logits are wanted), in as many calls as it takes."""
        for start in range(0, len(entries), PHYSICAL_BATCH):
            part = entries[start : start + PHYSICAL_BATCH]
            batch = self._api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (position, sequence, wanted) in enumerate(part):
                batch.token[i] = self._random.randrange(self._vocab)
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = wanted
            code = self._api.llama_decode(self._context, batch)
            self._api.llama_batch_free(batch)
            if code != 0:
                raise SystemExit(f"llama_decode gave {code}")
        self._api.llama_synchronize(self._context)

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)


def llama_api() -> Any:
    """llama.h as ctypes; SystemExit when the package is not installed."""
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise SystemExit(f"the package llama-cpp-python is not installed: pip install '.[peers]' ({error})") from error
    llama_cpp.llama_log_set(_silent(llama_cpp), None)
    return llama_cpp


_kept: list[Any] = []  # ctypes callbacks must outlive their registration


def _silent(api: Any) -> Any:
    _kept.append(api.llama_log_callback(lambda level, text, data: None))
    return _kept[-1]


def measure(gguf: str, threads: int, leg: str, tokens: int, batch: int, prompt_tokens: int) -> float:
    """Tokens per second, all sequences together."""
    empty = batch == 1  # llama-bench starts both its figures from an empty context
    before = 0 if empty else prompt_tokens
    context = Context(gguf, threads, max(512, batch * (before + tokens)), batch)
    context.decode([(i, 0, False) for i in range(16)])
    context.clear()
    if leg == "prefill":
        started = time.perf_counter()
        context.decode([(i, 0, i == tokens - 1) for i in range(tokens)])
        return tokens / (time.perf_counter() - started)
    if before:
        context.decode([(i, sequence, i == before - 1) for sequence in range(batch) for i in range(before)])
    started = time.perf_counter()
    for i in range(tokens):
        context.decode([(before + i, sequence, True) for sequence in range(batch)])
    return batch * tokens / (time.perf_counter() - started)


def quantize(source: str, target: str, kind: str, threads: int) -> None:
    api = llama_api()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], threads
    code = api.llama_model_quantize(source.encode(), target.encode(), params)
    if code != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}: code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("measure")
    for name, kind in (("gguf", str), ("threads", int), ("leg", str), ("tokens", int), ("batch", int), ("prompt", int)):
        speed.add_argument(name, type=kind)
    smaller = commands.add_parser("quantize")
    smaller.add_argument("source")
    smaller.add_argument("target")
    smaller.add_argument("kind", choices=list(FILE_TYPES))
    smaller.add_argument("threads", type=int)
    args = parser.parse_args()
    if args.command == "quantize":
        quantize(args.source, args.target, args.kind, args.threads)
        return
    rate = measure(args.gguf, args.threads, args.leg, args.tokens, args.batch, args.prompt)
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
