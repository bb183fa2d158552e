"""Step times of a real server, over HTTP: `python -m loadtest calibrate` writes what `plan` reads.

Decode: so many users that began together; the median gap is a step with as many rows. Prefill: the server's own time
to the first token of lone prompts, from its metrics, less one decode step. What the client sees beyond the server's own
time to the first token is what HTTP and the tokenizer take. Then a mixed load, by whose steps all that is put right
(fit.py): with other lengths than any workload has, so that none is planned from its own measurement.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import numpy as np

from loadtest.compare.machine import describe
from loadtest.compare.scrape import facts
from loadtest.compare.sides import Candidate
from loadtest.plan.fit import SeenStep, fit, seen_steps
from loadtest.plan.steps import Knots, Measured, MeasuredTimes
from loadtest.server_process import nvfp4_server
from loadtest.storms.target import Metrics, parse_metrics
from loadtest.traffic.call import Call, Conversation, Outcome
from loadtest.traffic.drive import closed_loop, run
from loadtest.traffic.wire import Endpoint
from loadtest.traffic.workloads import Lengths, Workload, conversations, find_workload

READY_SECONDS = 1800.0
ROWS = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (32, 128, 256, 512, 1024)
SHORT, DECODE_TOKENS, REPEATS = 8, 40, 3
CONTEXT_USERS = 4
MIXED_USERS, MIXED_EACH = (1, 3, 8), 8
MIXED_PROMPT, MIXED_ANSWER = 96, 40  # words, tokens
TTFT, COMPUTED = "vllm:time_to_first_token_seconds", "vllm:request_prefill_kv_computed_tokens"


@dataclass(frozen=True)
class Limits:
    """As the server is started with."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_context: int = 1024

    @property
    def flags(self) -> list[str]:
        return [
            "--max-num-seqs", str(self.max_num_seqs), "--max-num-batched-tokens", str(self.max_num_batched_tokens),
            "--enable-prompt-tokens-details",  # by which the fit knows what was not computed
        ]  # fmt: skip


def calibrate(candidate: Candidate, limits: Limits, say: Callable[[str], None]) -> Measured:
    """RuntimeError where requests fail or the server's metrics lack what is needed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*candidate.serve_arguments, *limits.flags, "--log-level", "warning", "--no-log-requests"]
        with nvfp4_server(flags, {}, READY_SECONDS, Path(folder) / "server.log") as server:
            return measure(server.url, candidate, limits, say)


def measure(url: str, candidate: Candidate, limits: Limits, say: Callable[[str], None]) -> Measured:
    found = facts(url)
    if found.memory.kv_tokens is None:
        raise RuntimeError(f"{url}/metrics does not say how many tokens its KV cache holds")
    probe = _Probe(url, Endpoint(url, found.model))
    probe.decode(2, SHORT, 8)  # whatever is slow once
    decode: Knots = []
    for rows in (rows for rows in ROWS if rows <= limits.max_num_seqs):
        decode.append((float(rows), probe.decode(rows, SHORT, DECODE_TOKENS)))
        say(f"decode, {rows} rows: {1e3 * decode[-1][1]:.2f} ms a step")
    context = _context_seconds(probe, decode, limits, say)
    prefill: Knots = []
    fronts: list[float] = []
    for length in (length for length in PROMPTS if length <= min(limits.max_context, limits.max_num_batched_tokens)):
        lone = probe.prefill(length)
        prefill.append((lone.computed, max(0.0, lone.server_seconds - decode[0][1])))
        fronts.append(lone.client_seconds - lone.server_seconds)
        say(f"prefill, {lone.computed:.0f} tokens: {1e3 * lone.server_seconds:.1f} ms")
    template, per_word = probe.tokens()
    probed = Measured(
        format="nvfp4-step-times-2",
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=describe(Path(__file__).parents[2]),
        model=Path(candidate.model).name,
        flags=list(candidate.flags),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=16,
        kv_tokens=found.memory.kv_tokens,
        front_seconds=max(0.0, float(np.median(fronts))),
        decode=decode,
        prefill=prefill,
        context_seconds=context,
        pair_seconds=_pair_seconds(probe, decode, prefill, limits, say),
        template_tokens=template,
        tokens_per_word=per_word,
    )
    return _in_company(probe, probed, limits, say)


def _in_company(probe: _Probe, probed: Measured, limits: Limits, say: Callable[[str], None]) -> Measured:
    """`probed`, put right by the steps of a mixed load."""
    shortest = probed.decode[0][1]
    times = MeasuredTimes(probed)

    def expected(step: SeenStep) -> float:
        return sum(times.parts(step.rows, step.prompt, step.context))

    steps = [step for users in MIXED_USERS for step in seen_steps(probe.mixed(users, limits), shortest, expected)]
    parts = np.array([times.parts(step.rows, step.prompt, step.context) for step in steps])
    found = fit(steps, parts[:, 0], parts[:, 1])
    say(
        f"{found.num_steps} steps of a mixed load: decode x {found.decode:.2f}, prefill x {found.prefill:.2f}, "
        f"{1e3 * found.newcomer_seconds:.1f} ms for a newcomer; mean error of a step {100 * found.error:.0f} %"
    )
    return msgspec.structs.replace(
        probed,
        decode=[(rows, found.decode * seconds) for rows, seconds in probed.decode],
        prefill=[(count, found.prefill * seconds) for count, seconds in probed.prefill],
        context_seconds=found.decode * probed.context_seconds,
        pair_seconds=found.prefill * probed.pair_seconds,
        newcomer_seconds=found.newcomer_seconds,
        scatter=found.scatter,
        prompt_scatter=found.prompt_scatter,
    )


def _context_seconds(probe: _Probe, decode: Knots, limits: Limits, say: Callable[[str], None]) -> float:
    users = min(CONTEXT_USERS, limits.max_num_seqs)
    short = dict(decode)[float(users)] if float(users) in dict(decode) else decode[-1][1]
    long = probe.decode(users, limits.max_context, DECODE_TOKENS // 2)
    found = max(0.0, (long - short) / (users * (limits.max_context - SHORT)))
    say(f"context: {1e9 * found:.1f} ns for each token")
    return found


def _pair_seconds(probe: _Probe, decode: Knots, prefill: Knots, limits: Limits, say: Callable[[str], None]) -> float:
    """From a prompt of two chunks: the second one's tokens see the first one's."""
    if limits.max_context < limits.max_num_batched_tokens or len(prefill) < 2:
        say("pairs: not measured, no prompt is longer than a chunk; taken as nothing")
        return 0.0
    first = limits.max_num_batched_tokens
    lone = probe.prefill(first + first // 2)
    second = lone.computed - first
    counts, seconds = [at for at, _ in prefill], [each for _, each in prefill]
    without = 2 * decode[0][1] + sum(float(np.interp(count, counts, seconds)) for count in (first, second))
    found = max(0.0, (lone.server_seconds - without) / (first * second))
    say(f"pairs: {1e9 * found:.2f} ns each")
    return found


@dataclass(frozen=True)
class _Lone:
    """Medians over lone prompts: tokens computed, and seconds to the first token as server and client saw it."""

    computed: float
    server_seconds: float
    client_seconds: float


class _Probe:
    """Asks the server for what shows one thing at a time."""

    def __init__(self, url: str, endpoint: Endpoint) -> None:
        self._url, self._endpoint = url, endpoint
        self._count = 0
        self._seen: list[tuple[int, int]] = []  # words and tokens of prompts

    def decode(self, users: int, words: int, tokens: int) -> float:
        """Seconds of a step with `users` rows: the median gap of users that began together."""
        talks = self._talks(f"{words}/{tokens}", users)
        outcomes = self._answers(talks, users, words)
        return float(np.median([gap for outcome in outcomes for gap in outcome.gaps]))

    def prefill(self, words: int) -> _Lone:
        found = []
        for _ in range(REPEATS):
            before = self._metrics()
            (outcome,) = self._answers(self._talks(f"{words}/2", 1), 1, words)
            after = self._metrics()
            grown = [after.total(f"{name}_sum") - before.total(f"{name}_sum") for name in (COMPUTED, TTFT)]
            found.append((*grown, outcome.ttft))
        return _Lone(*(float(np.median(column)) for column in zip(*found, strict=True)))

    def mixed(self, users: int, limits: Limits) -> list[Outcome]:
        """Of `users`, or as many as the server takes, who each ask MIXED_EACH times."""
        users = min(users, limits.max_num_seqs)
        prompt = Lengths(min(MIXED_PROMPT, limits.max_context / 2), 0.7)
        source = self._conversations(Workload("mixed", prompt, Lengths(MIXED_ANSWER, 0.6)))
        outcomes = self._checked([next(source) for _ in range(users * MIXED_EACH)], users)
        if any(outcome.cached_tokens is None for outcome in outcomes):
            raise RuntimeError(
                "the server's usage does not say how many tokens of a prompt were cached; "
                "start it with --enable-prompt-tokens-details"
            )
        return outcomes

    def tokens(self) -> tuple[int, float]:
        """Tokens of the chat template, and per word, by a line through all prompts."""
        words, tokens = np.array(self._seen, dtype=float).T
        per_word, template = np.polyfit(words, tokens, 1)
        return max(0, round(template)), float(per_word)

    def _talks(self, workload: str, count: int) -> list[Conversation]:
        source = self._conversations(find_workload(workload))
        return [Conversation((_only(next(source)),)) for _ in range(count)]

    def _conversations(self, workload: Workload) -> Iterator[Conversation]:
        self._count += 1
        return conversations(workload, f"calibrate {time.time_ns()} {self._count}")

    def _checked(self, talks: Sequence[Conversation], users: int) -> list[Outcome]:
        outcomes = run(closed_loop(self._endpoint, talks, users)).outcomes
        if failed := [outcome.failure for outcome in outcomes if outcome.failure is not None]:
            raise RuntimeError(f"a request of the calibration failed: {failed[0]}")
        return outcomes

    def _answers(self, talks: Sequence[Conversation], users: int, words: int) -> list[Outcome]:
        outcomes = self._checked(talks, users)
        self._seen += [(words, outcome.prompt_tokens or 0) for outcome in outcomes]
        return outcomes

    def _metrics(self) -> Metrics:
        found = parse_metrics(httpx.get(f"{self._url}/metrics", timeout=30).raise_for_status().text)
        if f"{TTFT}_sum" not in found.samples or f"{COMPUTED}_sum" not in found.samples:
            raise RuntimeError(f"{self._url}/metrics lacks {TTFT} or {COMPUTED}")
        return found


def _only(conversation: Conversation) -> Call:
    return conversation.calls[0]
