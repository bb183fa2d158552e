"""The short form of the abort storm: 600 requests left in eight ways, and everything given back."""

from __future__ import annotations

from loadtest.storms.aborts import run


def test_the_server_keeps_its_promises_in_a_storm_of_aborts() -> None:
    verdict = run(None, None, True)
    assert verdict.kept, verdict.text()
    assert verdict.figures["aborts"] == 600
