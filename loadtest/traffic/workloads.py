"""Seeded workloads: the same words, lengths and instants for whoever is measured.

Lengths are in words. Most of the words are one token of most vocabularies, so they are near to tokens; the figures
count tokens as the server reports them. Every prompt begins with words of its own, so that no prompt is found in a
prefix cache by accident; what is meant to be shared is shared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loadtest.traffic.call import Call, Conversation

_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were her all she there would their we him been has when who will more no if out so "
    "said what up its about into than them can only other new some could time these two may then do first any "
    "my now such like our over man me even most made after also did many before must through back years where "
    "much your way well down should because each just those people how too little state good very make world "
    "still own see men work long get here between both life being under never day same another know while last "
    "might us great old year off come since against go came right used take three small house water place "
    "light green field river music paper table stone story night"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of a mean, or exactly the mean where `spread` (sigma of the logarithm) is 0."""

    mean: float
    spread: float = 0.0

    def draw(self, source: random.Random) -> int:
        mu = math.log(self.mean) - self.spread**2 / 2
        return max(1, round(source.lognormvariate(mu, self.spread) if self.spread else self.mean))


@dataclass(frozen=True)
class Workload:
    """How prompts and answers are made.

    shared         words that begin the system prompt of a share of the conversations (`shared_by`)
    turns          calls per conversation
    think_seconds  between them
    """

    name: str
    prompt: Lengths
    answer: Lengths
    shared: int = 0
    shared_by: float = 0.0
    turns: int = 1
    think_seconds: float = 0.0

    def scaled(self, factor: float) -> Workload:
        """The same with all lengths times `factor`, for machines that would take hours."""
        return replace(
            self,
            prompt=replace(self.prompt, mean=max(1.0, self.prompt.mean * factor)),
            answer=replace(self.answer, mean=max(1.0, self.answer.mean * factor)),
            shared=round(self.shared * factor),
        )


WORKLOADS = {
    each.name: each
    for each in (
        Workload("chat", Lengths(128, 0.6), Lengths(128, 0.5)),
        Workload("rag", Lengths(1024, 0.3), Lengths(96, 0.4)),
        Workload("codegen", Lengths(256, 0.5), Lengths(384, 0.5)),
        Workload("shared-prefix", Lengths(64, 0.4), Lengths(96, 0.4), shared=2048, shared_by=0.9),
        Workload("multi-turn", Lengths(64, 0.4), Lengths(64, 0.4), turns=4, think_seconds=0.2),
    )
}


def find_workload(name: str) -> Workload:
    """One of WORKLOADS, or exact lengths as in 1024/128. ValueError lists what there is."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    prompt, _, answer = name.partition("/")
    if prompt.isdigit() and answer.isdigit() and int(prompt) and int(answer):
        return Workload(name, Lengths(int(prompt)), Lengths(int(answer)))
    raise ValueError(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}, or lengths such as 1024/128")


def conversations(workload: Workload, seed: str) -> Iterator[Conversation]:
    """Without end. Another seed gives other words in every prompt, but the shared ones."""
    shared = words(random.Random(f"{workload.name} shared"), workload.shared)
    number = 0
    while True:
        draw = random.Random(f"{workload.name} {seed} {number}")
        calls: list[Call] = []
        messages: list[tuple[str, str]] = []
        if workload.shared and draw.random() < workload.shared_by:
            messages.append(("system", shared))
        for _ in range(workload.turns):
            messages.append(("user", words(draw, workload.prompt.draw(draw))))
            answer = workload.answer.draw(draw)
            calls.append(Call(tuple(messages), answer))
            messages.append(("assistant", words(draw, answer)))
        yield Conversation(tuple(calls), think_seconds=workload.think_seconds)
        number += 1


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(count))


def poisson(rate: float, seconds: float, seed: str) -> list[float]:
    """Instants in [0, seconds) at `rate` per second; at least one."""
    draw, at, found = random.Random(f"poisson {seed}"), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        found.append(at)
    return found or [0.0]


def at_instants(source: Iterator[Conversation], instants: Sequence[float]) -> list[Conversation]:
    return [replace(next(source), at=at) for at in instants]
