"""The per-token histogram says what prometheus_client's own would."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.lean_histogram import LeanHistogram

BOUNDS = [0.01, 0.1, 1]


def test_exposition_equals_that_of_the_library_s_histogram():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    lean = LeanHistogram("x_seconds", "Text.", {"model_name": "m", "engine": "0"}, BOUNDS, ours)
    full = Histogram("x_seconds", "Text.", ("model_name", "engine"), buckets=BOUNDS, registry=theirs).labels("m", "0")
    for value, times in ((0.001, 1), (0.01, 2), (0.0100001, 1), (0.5, 3), (1.0, 1), (7.0, 2)):
        lean.observe(value, times)
        for _ in range(times):
            full.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)
