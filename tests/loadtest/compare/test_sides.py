"""Who is compared, in which order, and what of it reaches `nvfp4 eval`."""

from __future__ import annotations

import http.server
import json
import os
import threading
from pathlib import Path

import pytest

from loadtest.compare.machine import Energy
from loadtest.compare.quality import from_evaluation, quality
from loadtest.compare.report import Estimate, Memory
from loadtest.compare.scrape import facts, listener_rss_bytes, memory
from loadtest.compare.sides import Candidate, parse_model, visits
from loadtest.storms.target import parse_metrics


def test_passes_go_there_and_back():
    assert visits(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_a_model_is_a_label_a_folder_and_flags(tmp_path):
    found = parse_model(f"w4a4={tmp_path} --numerics w4a4 --kv-cache-dtype=fp8 --max-num-seqs 4")
    assert found == Candidate(
        "w4a4", str(tmp_path), ("--numerics", "w4a4", "--kv-cache-dtype=fp8", "--max-num-seqs", "4")
    )
    assert found.serve_arguments[0] == str(tmp_path)
    assert found.eval_flags == ["--numerics", "w4a4", "--kv-cache-dtype", "fp8"]


@pytest.mark.parametrize("text", ["", "nolabel", "=x", "a=/no/such/folder", "a=--numerics w4a4"])
def test_what_names_no_model_is_refused(text):
    with pytest.raises(ValueError, match=r"expected LABEL=DIR|there is no folder|names no model folder"):
        parse_model(text)


def test_quality_says_why_it_is_missing():
    assert "foreign" in quality(Candidate("x", url="http://127.0.0.1:1"), None).note
    assert "--quality-text" in quality(Candidate("x", "dir"), None).note
    assert "simulated" in quality(Candidate("x", "simulated", ("--simulate",)), None).note


def test_an_evaluation_is_read():
    divergence = {
        "kl": {"mean": 0.2, "low": 0.1, "high": 0.3},
        "top1_agreement": {"mean": 0.8, "low": 0.7, "high": 0.9},
    }
    student = {"perplexity": {"mean": 30.0, "low": 28.0, "high": 32.0}, "divergence": divergence}
    report = {"students": [student], "num_scored": 510, "text": "t.txt", "num_windows": 2, "window": 256}
    found = from_evaluation(report, False)
    assert found.perplexity == Estimate(30.0, 28.0, 32.0)
    assert found.kl == Estimate(0.2, 0.1, 0.3)
    assert found.note == "510 positions of t.txt in 2 windows of 256 tokens"
    own = from_evaluation({**report, "students": [student | {"divergence": None}]}, True)
    assert (own.kl, own.top1) == (Estimate(0.0), Estimate(1.0))


def test_memory_is_what_the_metrics_say_and_nothing_else():
    text = (
        'nvfp4_weight_bytes{stored="nvfp4"} 60\nnvfp4_weight_bytes{stored="bf16"} 50\nnvfp4_kv_cache_bytes 4e3\n'
        'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="186384",num_gpu_blocks="11650"} 1.0\n'
        "process_resident_memory_bytes 7\n"
    )
    assert memory(parse_metrics(text)) == Memory(110, 4000, 186384, 7)
    foreign = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    assert memory(parse_metrics(foreign)) == Memory(None, None, 1600, None)
    assert memory(parse_metrics("")) == Memory()


def test_llama_cpp_tells_its_weights_and_is_seen_to_hold_memory():
    """/v1/models as its server b11549 has it; it has no /version, and its /metrics say nothing of memory."""
    model = {"id": "m.Q4_1", "owned_by": "llamacpp", "meta": {"size": 96576768, "ftype": "Q4_1", "n_params": 134515008}}

    class LlamaCpp(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = {"/v1/models": json.dumps({"data": [model]}), "/metrics": "llamacpp:n_tokens_max 36\n"}.get(
                self.path
            )
            body = (found or "{}").encode()
            self.send_response(200 if found else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LlamaCpp)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        found = facts(url)
    finally:
        server.shutdown()
        server.server_close()
    assert (found.model, found.numerics, found.version) == ("m.Q4_1", "Q4_1", "")
    assert (found.memory.weight_bytes, found.memory.kv_tokens) == (96576768, None)
    assert found.memory.rss_bytes is not None
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # ours, a moment ago: imports of the request may have grown it since
    assert 0.5 < found.memory.rss_bytes / (pages * os.sysconf("SC_PAGE_SIZE")) <= 1.01
    assert listener_rss_bytes(url) is None  # closed
    assert listener_rss_bytes("http://192.0.2.1:80") is None


def test_energy_is_read_from_packages_and_survives_a_wrap(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package: counted in it already
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone / "energy_uj").write_text("9000000\n")
    energy = Energy(tmp_path)
    if energy.source == "NVML":
        pytest.skip("this machine has an NVIDIA GPU: its energy is read instead of the processor's")
    (zone / "energy_uj").write_text("500000\n")
    assert energy.joules() == pytest.approx(1.5)
    nothing = Energy(tmp_path / "none")
    assert nothing.joules() is None
    assert "not readable" in nothing.why_not
