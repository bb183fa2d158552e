"""aiperf's records become outcomes; where it is installed, it agrees with our own client."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from loadtest.compare.aiperf import Aiperf, read_records
from loadtest.compare.loads import warm_up
from loadtest.compare.report import Arrival
from loadtest.neighbours import Neighbours
from loadtest.server_process import nvfp4_server
from loadtest.traffic.call import Call, Conversation
from loadtest.traffic.drive import closed_loop, run
from loadtest.traffic.figures import SLO, figures
from loadtest.traffic.truth import SCRIPT
from loadtest.traffic.wire import Endpoint
from loadtest.traffic.workloads import conversations, find_workload

SECOND = 1_000_000_000
RECORD = {
    "metadata": {
        "credit_issued_ns": 5 * SECOND, "request_start_ns": 5 * SECOND + 2_000_000, "request_end_ns": 6 * SECOND,
        "benchmark_phase": "profiling",
    },
    "metrics": {
        "time_to_first_token": {"value": 98.0, "unit": "ms"}, "inter_chunk_latency": {"value": [10.0, 20.0]},
        "output_sequence_length": {"value": 9}, "usage_completion_tokens": {"value": 3},
        "usage_prompt_tokens": {"value": 7},
    },
}  # fmt: skip


def test_records_are_read_from_when_a_request_was_issued():
    later = json.loads(json.dumps(RECORD))
    for name in ("credit_issued_ns", "request_start_ns", "request_end_ns"):
        later["metadata"][name] += SECOND
    later["error"] = {"message": "refused"}
    warm = json.loads(json.dumps(RECORD))
    warm["metadata"]["benchmark_phase"] = "warmup"
    one, two = read_records([json.dumps(each) for each in (RECORD, later, warm)])
    assert one.failure is None
    assert one.ttft == pytest.approx(0.1)  # 2 ms until it was sent, and 98
    assert one.gaps == pytest.approx([0.01, 0.02])
    assert (one.completion_tokens, one.prompt_tokens) == (3, 7)
    assert one.e2e == pytest.approx(1.0)
    assert two.due == pytest.approx(1.0)
    assert two.failure is not None
    assert "refused" in two.failure


def test_what_it_is_not_asked_to_do_is_refused(tmp_path):
    call = Call((("user", "x"),), 1)
    engine = Aiperf("aiperf", tmp_path)
    endpoint = Endpoint("http://127.0.0.1:1", "m")
    with pytest.raises(ValueError, match="--engine builtin"):
        engine.run(endpoint, [Conversation((call, call))], Arrival("closed", 1.0), 0)
    with pytest.raises(ValueError, match="--engine builtin"):
        engine.run(endpoint, [Conversation((call,))], Arrival("trace", 1.0), 0)
    with pytest.raises(ValueError, match="pip install aiperf"):
        Aiperf.find("no-such-program-aiperf", tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_aiperf_and_the_builtin_client_agree_on_throughput_within_3_percent(default_model, tmp_path):
    """In turns: ours, theirs, ours."""
    program = shutil.which(os.environ.get("AIPERF", "aiperf"))
    if program is None:
        pytest.skip("aiperf is not installed: pip install aiperf in an environment of its own, and name it in AIPERF")
    aiperf = Aiperf.find(program, default_model.nvfp4)
    flags = ["--simulate", "--simulate-script", SCRIPT, "--simulate-step-seconds", "0.05", "--log-level", "warning"]
    source = conversations(find_workload("8/24"), "aiperf")
    talks = [next(source) for _ in range(64)]
    with nvfp4_server(flags, {}, 60, tmp_path / "server.log") as server:
        endpoint = Endpoint(server.url, "simulated")
        run(closed_loop(endpoint, warm_up(8, "aiperf"), 8))
        neighbours = Neighbours()
        ours = [figures(run(closed_loop(endpoint, talks, 8)).outcomes, SLO())]
        theirs = figures(aiperf.run(endpoint, talks, Arrival("closed", 8.0), 0), SLO())
        ours.append(figures(run(closed_loop(endpoint, talks, 8)).outcomes, SLO()))
    for found in (*ours, theirs):
        assert found.whole == 64
        assert found.output_tokens == 64 * 24
    mean = sum(found.output_per_second for found in ours) / 2
    error = theirs.output_per_second / mean - 1
    print(
        f"ours {[round(found.output_per_second, 1) for found in ours]}, aiperf {theirs.output_per_second:.1f} tokens/s"
    )
    medians = [1e3 * found.ttft.p50 for found in (*ours, theirs)]
    print(f"median time to first token, ms: ours {medians[0]:.1f} and {medians[1]:.1f}, aiperf {medians[2]:.1f}")
    if abs(error) > 0.03 and (busy := neighbours.cores() or 0.0) > 0.5:
        pytest.skip(f"others use {busy:.1f} cores of this machine, which aiperf's processes need: {100 * error:+.1f} %")
    assert abs(error) <= 0.03
