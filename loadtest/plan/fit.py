"""From a mixed load to what single probes cannot show: what steps cost in company, and how they scatter.

Probes look at one thing at a time and give medians. Under a mixed load client, server and engine share the cores, new
requests are parsed and tokenised while others decode, and a step now and then is late. The steps of the engine can be
seen from outside: tokens of one step come together. Each such step's rows, prompt tokens and newcomers are known, so
that what it should have taken, by the probes, can be held against what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.traffic.call import Outcome

TOGETHER = 0.4  # of the shortest step: tokens closer to each other than that came from one step
FRAGMENT = 0.8  # of what a step should take
QUANTILES = 100
FEWEST_STEPS, FEWEST_PROMPTS = 100, 20
FACTORS = (0.5, 2.0)  # bounds: what is next to nothing (a prompt token of a simulated engine) may get any factor
ROUNDS, SMALL_ERROR = 20, 0.01  # of the fit; errors below that weigh alike

Floats = npt.NDArray[np.float64]


@dataclass
class SeenStep:
    """One step of an engine that had something to do before it and after it.

    rows       requests that got a token other than their first
    prompt     prompt tokens of those that got their first, what was cached left out
    context    tokens before those of `rows`, all rows together
    newcomers  requests sent while it ran
    seconds    from the tokens of the step before to those of this one
    """

    rows: int
    prompt: int
    context: int
    newcomers: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What to multiply probed times by, and what to add.

    decode, prefill    factors of a step's share for its rows and for its prompt tokens
    newcomer_seconds   that a step takes longer for each request that is sent while it runs
    scatter            quantiles of real over expected seconds of steps without prompt tokens, their mean 1
    prompt_scatter     the same of steps with some
    error              mean of |real / expected - 1|
    """

    decode: float
    prefill: float
    newcomer_seconds: float
    scatter: tuple[float, ...]
    prompt_scatter: tuple[float, ...]
    error: float
    num_steps: int


Burst = list[tuple[float, int, int]]  # (instant, which outcome, which of its tokens)


def seen_steps(
    outcomes: Sequence[Outcome], shortest_seconds: float, probed: Callable[[SeenStep], float]
) -> list[SeenStep]:
    """Of whole answers. What began while nobody waited is left out: when it began is not seen.

    Tokens of one step leave one after the other, and the last ones late where the server has to wait for a core. So
    what comes within FRAGMENT of the time that `probed` has for it belongs to the step before, unless a request would
    get two tokens of that.
    """
    sent = np.sort([outcome.sent for outcome in outcomes])
    firsts = np.sort([outcome.arrivals[0] for outcome in outcomes])
    lasts = np.sort([outcome.arrivals[-1] for outcome in outcomes])
    whole: list[tuple[Burst, SeenStep | None]] = []
    for burst in _bursts(outcomes, TOGETHER * shortest_seconds):
        before = whole[-1][0] if whole else []
        idle = not before or _answering(before[-1][0], firsts, lasts) == 0
        step = None if idle else _step(before[0][0], burst, outcomes, sent)
        alone = {number for _, number, _ in before}.isdisjoint(number for _, number, _ in burst)
        if step is not None and alone and step.seconds < FRAGMENT * probed(step):
            merged = [*before, *burst]
            earlier = whole[-2][0] if whole[-1][1] is not None else None
            whole[-1] = (merged, None if earlier is None else _step(earlier[0][0], merged, outcomes, sent))
        else:
            whole.append((burst, step))
    return [step for _, step in whole if step is not None]


def _answering(at: float, firsts: Floats, lasts: Floats) -> int:
    """Requests that have begun to answer and have not ended."""
    return int(np.searchsorted(firsts, at, "right") - np.searchsorted(lasts, at, "right"))


def _bursts(outcomes: Sequence[Outcome], together_seconds: float) -> list[Burst]:
    """Tokens no further apart than that, none of one request twice."""
    found: list[Burst] = []
    for event in sorted(
        (at, number, i) for number, outcome in enumerate(outcomes) for i, at in enumerate(outcome.arrivals)
    ):
        last = found[-1] if found else None
        if last is None or event[0] - last[-1][0] > together_seconds or any(event[1] == one for _, one, _ in last):
            found.append([event])
        else:
            last.append(event)
    return found


def _step(began: float, burst: Burst, outcomes: Sequence[Outcome], sent: Floats) -> SeenStep:
    ended = burst[0][0]
    newcomers = int(np.searchsorted(sent, ended) - np.searchsorted(sent, began))
    step = SeenStep(0, 0, 0, newcomers, ended - began)
    for _, number, i in burst:
        outcome = outcomes[number]
        if i:
            step.rows += 1
            step.context += (outcome.prompt_tokens or 0) + i
        else:
            step.prompt += (outcome.prompt_tokens or 0) - (outcome.cached_tokens or 0)
    return step


def fit(steps: Sequence[SeenStep], decode: Floats, prefill: Floats) -> Fit:
    """Least absolute relative errors, so that a late step counts as one; then all scaled so that the time of all steps
    together is kept, late ones included. Nothing becomes negative.

    decode, prefill  [S]    what the probes say of each step's rows (with their context) and of its prompt tokens

    ValueError with too few steps of either kind.
    """
    seconds = np.array([step.seconds for step in steps])
    prompts = np.array([step.prompt > 0 for step in steps], dtype=bool)
    for what, count, least in (("", len(steps), FEWEST_STEPS), (" with prompts", int(prompts.sum()), FEWEST_PROMPTS)):
        if count < least:
            raise ValueError(f"{count} steps{what} were seen under the mixed load; at least {least} are needed")
    newcomers = np.array([float(step.newcomers) for step in steps])
    parts = np.stack([decode, prefill, newcomers], axis=1)
    probed = decode + prefill
    factors = _least_absolute(parts / probed[:, None], seconds / probed)
    expected = parts @ factors
    scale = float(seconds.sum() / expected.sum())
    ratios = seconds / (scale * expected)
    decoding, prefilling = (float(np.clip(scale * factor, *FACTORS)) for factor in factors[:2])
    newcomer = float(scale * factors[2])
    error = float(np.abs(ratios - 1).mean())
    return Fit(decoding, prefilling, newcomer, _spread(ratios[~prompts]), _spread(ratios[prompts]), error, len(steps))


def _spread(ratios: Floats) -> tuple[float, ...]:
    """Of a distribution of mean 1, the middles of equal shares: one drawn from them at random is drawn from it."""
    found = np.quantile(ratios, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    return tuple(round(float(each), 4) for each in found / found.mean())


def _least_absolute(parts: Floats, wanted: Floats) -> Floats:
    """By least squares with weights of 1 / |error|, again and again."""
    weights = np.ones(len(wanted))
    for _ in range(ROUNDS):
        factors = _least_squares(parts * weights[:, None], wanted * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(parts @ factors - wanted), SMALL_ERROR))
    return factors


def _least_squares(parts: Floats, wanted: Floats) -> Floats:
    """Non-negative: what would be negative is left out, and the others found anew."""
    kept = [i for i in range(parts.shape[1]) if parts[:, i].any()]
    factors = np.zeros(parts.shape[1])
    while kept:
        found = np.linalg.lstsq(parts[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all():
            factors[kept] = found
            break
        kept.pop(int(np.argmin(found)))
    return factors
