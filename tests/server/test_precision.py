"""GET /v1/precision."""

from __future__ import annotations

import pytest

from nvfp4_runtime.engine.messages import LayerGroup, MachineLimits
from server.routes.precision import PrecisionReport
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve


async def test_the_report_says_how_each_group_is_stored_and_run_and_why(serve: Serve) -> None:
    server = await serve()
    found = (await server.http.get("/v1/precision")).json()
    assert found["object"] == "precision_report"
    assert (found["model"], found["numerics"]) == ("tiny", "w4a16")
    assert found["layers"] == [
        {
            "name": "qkv_proj",
            "count": 2,
            "stored": "nvfp4",
            "bits_per_weight": 4.5,
            "bytes": 1000,
            "backend": "cpu",
            "numerics": "w4a16",
            "reason": "",
        }
    ]
    assert (found["head"]["stored"], found["head"]["reason"]) == ("bf16", "cpu: not built")
    assert [op["name"] for op in found["ops"]] == ["norm", "rope", "attention"]
    assert found["kv_cache"] == {
        "dtype": "bfloat16",
        "bytes": 65 * 16 * 1024,
        "blocks": 64,
        "block_size": 16,
        "tokens": 1024,
        "bytes_per_token": 1024,
        "prefix_caching": True,
    }
    assert found["totals"]["weight_bytes"] == 1500
    assert found["totals"]["bits_per_weight"] == pytest.approx(8 * 1500 / (8000 / 4.5 + 4000 / 16))
    assert found["machine_limits"] is None
    completion = (await server.complete(max_tokens=1)).json()
    assert found["system_fingerprint"] == completion["system_fingerprint"]


async def test_the_machines_limits_are_in_it_where_they_are_known(serve: Serve) -> None:
    limits = MachineLimits(20e9, 300e9, "configured")
    server = await serve(FakeEngine(info=fake_info(limits=limits, scratch_bytes={"step": 7})))
    found = (await server.http.get("/v1/precision")).json()
    assert found["machine_limits"] == {"read_bytes_per_second": 20e9, "flops_per_second": 300e9, "how": "configured"}
    assert found["totals"]["scratch_bytes"] == {"step": 7}


async def test_a_simulated_engine_has_no_layers_and_no_head(serve: Serve) -> None:
    layers = [LayerGroup("simulated", 0, "none", 0.0, 0, "simulated", "simulated")]
    server = await serve(FakeEngine(info=fake_info(layers=layers, weight_bytes={})))
    found = (await server.http.get("/v1/precision")).json()
    assert (found["layers"], found["head"], found["totals"]["bits_per_weight"]) == ([], None, 0.0)


async def test_the_document_describes_every_field(serve: Serve) -> None:
    server = await serve()
    document = (await server.http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/precision"]["get"]
    reference = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert set(schema["properties"]) == set(PrecisionReport.model_fields)
    assert "401" in operation["responses"]


async def test_it_needs_the_key_where_there_is_one(serve: Serve) -> None:
    from server.config import hash_key

    server = await serve(api_key_hashes=(hash_key("k"),))
    assert (await server.http.get("/v1/precision")).status_code == 401
    assert (await server.http.get("/v1/precision", headers={"authorization": "Bearer k"})).status_code == 200
