"""schemathesis on our own OpenAPI document: thousands of requests, none of them answered with a 5xx.

The answers are held against the document as well: status, content type, and the shape of errors.
"""

from __future__ import annotations

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.conftest import Launch, LiveServer

# Requests per operation: with a body, and with at most an id in its path. In all at least 2,000.
MANY, FEW = 230, 20
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(launch: Launch) -> LiveServer:
    """No time between tokens and a short context: what is asked for without end ends soon."""
    return launch("--simulate", "--max-model-len", "256", "--num-kv-blocks", "400", "--log-level", "warning")


def test_no_request_that_the_document_allows_or_forbids_gets_a_5xx(server: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    session = requests.Session()
    count = 0
    statuses: dict[int, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        examples = MANY if operation.body else FEW

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: schemathesis.Case) -> None:
            nonlocal count
            response = case.call(session=session, timeout=30)
            count += 1
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            # a request that asks for less time than it takes has asked for its 504
            ran_out = response.status_code == 504 and isinstance(case.body, dict) and "timeout" in case.body
            case.validate_response(response, checks=CHECKS[1:] if ran_out else CHECKS)

        one()
    assert count >= 2000, (count, statuses)
    assert statuses.get(200, 0) > 200, f"hardly anything was accepted: {statuses}"
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.assert_idle(30)
