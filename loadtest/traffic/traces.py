"""Recorded traffic to replay: Mooncake's and BurstGPT's formats, told apart by what the file holds.

Mooncake: JSON lines with `timestamp` (milliseconds), `input_length`, `output_length` and `hash_ids`, one for each 512
tokens of the prompt: equal ids mean an equal beginning. BurstGPT: CSV with Timestamp (seconds), Model, Request tokens,
Response tokens, Total tokens, Log Type. The words of a prompt are made up; its length and what it shares are not.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from loadtest.traffic.call import Call, Conversation
from loadtest.traffic.workloads import words

SAMPLES = Path(__file__).with_name("samples")
HASH_TOKENS = 512
_BURST = ("Timestamp", "Request tokens", "Response tokens")


@dataclass(frozen=True)
class Recorded:
    """One request: when (seconds from the first one), and how many tokens in and out."""

    at: float
    prompt: int
    answer: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Recorded]:
    """In order of time. ValueError names file, line, what was found and what was expected."""
    with path.open(encoding="utf-8", newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            found = [_mooncake(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
        elif all(name in first for name in _BURST):
            rows = enumerate(csv.DictReader(file), 2)
            # a failed request has no answer, and cannot be replayed
            found = [each for number, row in rows if (each := _burst(path, number, row)).answer]
        else:
            raise ValueError(
                f"{path}: begins with {first[:80]!r}; expected Mooncake's JSON lines or BurstGPT's CSV with the "
                f"columns {', '.join(_BURST)}"
            )
    if not found:
        raise ValueError(f"{path}: no request in it")
    found.sort(key=lambda each: each.at)
    begin = found[0].at
    return [Recorded(each.at - begin, each.prompt, each.answer, each.hash_ids) for each in found]


def _mooncake(path: Path, number: int, line: str) -> Recorded:
    try:
        fields = json.loads(line)
        ids = tuple(int(each) for each in fields.get("hash_ids", ()))
        found = Recorded(
            float(fields["timestamp"]) / 1000, int(fields["input_length"]), int(fields["output_length"]), ids
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}:{number}: {line.strip()[:120]!r}: expected numbers timestamp, input_length and output_length "
            f"({type(error).__name__}: {error})"
        ) from error
    return _checked(path, number, found)


def _burst(path: Path, number: int, row: dict[str, str]) -> Recorded:
    try:
        at, prompt, answer = (float(row[name]) for name in _BURST)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}:{number}: expected numbers in {', '.join(_BURST)}; found {row}") from error
    return _checked(path, number, Recorded(at, int(prompt), int(answer)), may_be_unanswered=True)


def _checked(path: Path, number: int, found: Recorded, may_be_unanswered: bool = False) -> Recorded:
    least = 0 if may_be_unanswered else 1
    if not (found.at >= 0 and found.prompt >= 1 and found.answer >= least):
        raise ValueError(
            f"{path}:{number}: {found.at:g} s, {found.prompt} tokens in, {found.answer} out; expected a time of 0 or "
            "more, and at least one token each"
        )
    return found


def replay(
    recorded: list[Recorded], seed: str, speedup: float = 1.0, scale: float = 1.0, seconds: float | None = None
) -> list[Conversation]:
    """Conversations of one call at the recorded instants, `speedup` times as fast.

    scale    of all lengths
    seconds  what is due later is left out; None: all of it
    """
    found = []
    for number, each in enumerate(recorded):
        at = each.at / speedup
        if seconds is not None and at >= seconds:
            break
        prompt, answer = max(1, round(each.prompt * scale)), max(1, round(each.answer * scale))
        text = _prompt(each, prompt, scale, random.Random(f"{seed} {number}"))
        found.append(Conversation((Call((("user", text),), answer),), at=at))
    return found


def _prompt(each: Recorded, length: int, scale: float, draw: random.Random) -> str:
    """Words of whole hash blocks depend on their ids alone; the rest is this request's own."""
    block = max(1, round(HASH_TOKENS * scale))
    whole = min(len(each.hash_ids), length // block)
    parts = [words(random.Random(f"block {number}"), block) for number in each.hash_ids[:whole]]
    rest = length - whole * block
    return " ".join([*parts, words(draw, rest)] if rest else parts)
