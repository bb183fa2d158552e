"""The whole call: every part is started, what fails is told and fails the run, the JSON file holds it all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loadtest.bench_gpu import __main__ as bench
from loadtest.bench_gpu import end_to_end
from loadtest.bench_gpu.children import Budget, Outcome
from loadtest.bench_gpu.model import TINY


def run(monkeypatch, tmp_path, outcomes, *arguments):
    """Exit code and JSON of a call whose parts end as `outcomes` say; those not named find nothing."""
    started = []

    def run_part(part, module, arguments, budget, at_most, environment):
        assert isinstance(budget, Budget)
        started.append((part, module, arguments, environment))
        return outcomes.get(part, Outcome(part))

    monkeypatch.setattr(bench, "run_part", run_part)
    file = tmp_path / "out" / "bench.json"
    code = bench.main(["--scratch", str(tmp_path), "--json", str(file), *arguments])
    return code, json.loads(file.read_text()), started


def test_every_part_runs_in_order_of_worth(monkeypatch, tmp_path):
    code, found, started = run(monkeypatch, tmp_path, {})
    assert code == 0
    assert [part for part, *_ in started] == list(bench.PARTS)
    assert sum(bench.PARTS.values()) > bench.BUDGET_SECONDS, "parts share what others leave"
    assert {t["verdict"] for t in found["targets"]} == {"not measured"}
    assert all(environment == {} for *_, environment in started)


def test_a_part_that_failed_is_one_line_and_the_others_ran(monkeypatch, tmp_path, capsys):
    trouble = Outcome("linear", [], "ended with code 1: RuntimeError: out of memory")
    wrong = Outcome("check", [{"part": "check", "name": "rms_norm", "backend": "triton", "ok": False, "worst": 7.0}])
    refused = Outcome("attention", [{"part": "attention", "backend": "blackwell", "refused": "runs linears only"}])
    outcomes = {"linear": trouble, "check": wrong, "attention": refused}
    code, found, started = run(monkeypatch, tmp_path, outcomes)
    assert code == 1
    assert len(started) == len(bench.PARTS)
    printed = capsys.readouterr().out.partition("not as it should be:")[2]
    assert "linear: ended with code 1" in printed
    assert "check: rms_norm" in printed
    assert "blackwell" not in printed, "a refusal is no fault"
    assert found["parts"][list(bench.PARTS).index("linear")]["trouble"] == trouble.trouble


def test_a_rehearsal_is_interpreted_and_claims_nothing(monkeypatch, tmp_path):
    limits = [{"part": "limits", "name": n, "value": 1e12} for n in ("copy_bandwidth", "bf16_rate")]
    decode = {"part": "end_to_end", "name": "decode", "batch": 1, "context": 20.0, "rate": 1.0, "seconds": 1.0}
    rows = [decode | {"numerics": "w4a16", "kv_dtype": "bfloat16"}]
    outcomes = {"limits": Outcome("limits", limits), "nvfp4": Outcome("nvfp4", rows)}
    _, found, started = run(monkeypatch, tmp_path, outcomes, "--rehearse")
    assert found["rehearsal"] is True
    assert {t["verdict"] for t in found["targets"]} == {"not measured"}
    assert all(environment == {"TRITON_INTERPRET": "1"} for *_, environment in started)
    assert all("--rehearse" in arguments for _, _, arguments, _ in started)


def test_parts_can_be_chosen(monkeypatch, tmp_path):
    _, _, started = run(monkeypatch, tmp_path, {}, "--only", "limits", "rcp")
    assert [part for part, *_ in started] == ["rcp", "limits"]


@pytest.mark.slow
def test_without_a_gpu_kernel_parts_end_with_a_reason():
    code = (
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: False\n"
        "sys.argv = ['gpu_bench', 'limits']\n"
        "from nvfp4_runtime.kernels.gpu_bench.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_the_engine_is_measured_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(end_to_end.RUNS, "nvfp4", (("w4a16", "fp8"),))
    assert end_to_end.main(["nvfp4", "--rehearse", "--scratch", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert [row["name"] for row in rows] == ["write", "start", "decode", "decode", "prefill"]
    assert [row["batch"] for row in rows if row["name"] == "decode"] == [1, 3]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[1]["kernels"]


def test_an_engine_that_will_not_start_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(end_to_end.RUNS, "nvfp4", (("w4a16", "no such type"),))
    assert end_to_end.main(["nvfp4", "--rehearse", "--scratch", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["write", "start"]
    assert "cannot be configured" in rows[1]["failed"]


def test_a_full_disk_is_told_before_writing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(end_to_end.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert end_to_end.main(["bf16", "--rehearse", "--scratch", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "are to be written" in rows[0]["failed"]
    assert len(rows) == 1


def test_the_cache_holds_the_largest_batch_and_the_last_prompt_meets_the_first_sequence(tmp_path):
    for load in (end_to_end.FULL, end_to_end.REHEARSAL):
        made = end_to_end.config(load, tmp_path, "w4a16", "fp8")
        batch = max(load.batches)
        tokens = load.context + load.new(batch)
        assert (made["cache"]["num_blocks"] - 1) * end_to_end.BLOCK_SIZE >= batch * tokens
        assert made["scheduler"]["max_model_len"] >= max(tokens, load.prefill + 1)
        # while the last prompt is read the first sequence has not finished, `steps` before its end
        assert load.new(batch) - -(-batch * load.context // load.step_tokens) >= load.steps
    assert made["scheduler"]["max_model_len"] <= TINY.max_positions
