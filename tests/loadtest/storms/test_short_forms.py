"""The short form of each storm keeps the promises of the long one, with room for the tests that run beside it."""

from __future__ import annotations

import pytest

from loadtest.storms import aborts, connections, determinism, grammars, soak, streams
from loadtest.storms.verdict import Verdict
from tests.conftest import DefaultModel


def assert_kept(verdict: Verdict) -> Verdict:
    assert verdict.kept, verdict.text()
    return verdict


def test_a_storm_of_aborts() -> None:
    assert assert_kept(aborts.run(None, None, True)).figures["aborts"] == aborts.SHORT_COUNT


def test_hundreds_of_streams() -> None:
    assert assert_kept(streams.run(None, None, True)).figures["ended"] == {"whole": streams.SHORT.count}


def test_noise_bent_and_smuggled_requests_and_slow_heads() -> None:
    verdict = assert_kept(connections.run(None, None, True))
    assert len(verdict.figures["connections"]) == len(connections.KINDS)


@pytest.mark.model
def test_grammars_that_are_meant_to_hurt(default_model: DefaultModel) -> None:
    assert_kept(grammars.run(None, None, True))


@pytest.mark.model
def test_the_same_tokens_in_any_company(default_model: DefaultModel) -> None:
    from nvfp4_runtime.kernels.cpu.backend import CPUBackend

    if (missing := CPUBackend().missing) is not None:
        pytest.skip(f"the plain kernels are not batch invariant, and those of the cpu backend: {missing}")
    assert_kept(determinism.run(None, None, True))


@pytest.mark.model
def test_mixed_traffic_leaves_nothing_behind(default_model: DefaultModel) -> None:
    assert_kept(soak.run(None, None, True))
