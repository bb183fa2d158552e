"""The sampler's plain twin: loops over Python numbers, written to be read. Sums are exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from nvfp4_runtime.sampling.params import SamplingParams


def edited(row: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], eos: tuple[int, ...]):
    """Logits after bias, min_tokens and penalties, each operation rounded to float32 as the sampler's are."""
    logits = [np.float32(x) for x in row]
    for token, bias in params.logit_bias.items():
        logits[token] = logits[token] + np.float32(bias)
    if len(output) < params.min_tokens:
        for token in (*eos, *params.stop_token_ids):
            if token < len(logits):
                logits[token] = np.float32(-np.inf)
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        for token in set(prompt) | set(output):
            x = logits[token]
            logits[token] = x / penalty if x > 0 else x * penalty
    for token in set(output):
        logits[token] = logits[token] - np.float32(params.frequency_penalty) * np.float32(output.count(token))
        logits[token] = logits[token] - np.float32(params.presence_penalty)
    return np.array(logits, dtype=np.float32)


def kept(row: np.ndarray, probs: np.ndarray, params: SamplingParams) -> list[int]:
    """Token ids that survive min_p, top_k and top_p, largest logit first, lower id first among equals.

    probs  the sampler's float32 exp((row - max(row)) / temperature), which test_draw compares with FP64
    """
    tokens = sorted(range(len(probs)), key=lambda t: (-row[t], t))
    tokens = [t for t in tokens if probs[t] > 0 and probs[t] >= np.float32(params.min_p)]
    if params.top_k > 0:
        tokens = tokens[: params.top_k]
    if params.top_p < 1:
        # One FP64 product: top_p 0.01 of 3000 equal tokens is 30 of them, though 0.01 in binary is a little more.
        needed = Fraction(params.top_p * float(sum(Fraction(float(probs[t])) for t in tokens)))
        mass, nucleus = Fraction(0), []
        for t in tokens:
            nucleus.append(t)
            mass += Fraction(float(probs[t]))
            if mass >= needed:
                break
        tokens = nucleus
    return tokens


def drawn(row: np.ndarray, probs: np.ndarray, params: SamplingParams, u: float) -> int:
    """The kept token at share `u` of the kept mass."""
    tokens = kept(row, probs, params)
    target = Fraction(u) * sum(Fraction(float(probs[t])) for t in tokens)
    mass = Fraction(0)
    for t in tokens:
        mass += Fraction(float(probs[t]))
        if mass > target:
            return t
    raise AssertionError("u < 1, so some token was passed")


def logprobs(row: np.ndarray) -> list[float]:
    """log softmax in FP64."""
    largest = max(float(x) for x in row)
    total = math.fsum(math.exp(float(x) - largest) for x in row)
    return [float(x) - largest - math.log(total) for x in row]
