"""SamplingParams of the wrong types are refused by name before they reach the engine."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 1.5),
        ("max_tokens", 2.5),
        ("logprobs", True),
        ("temperature", "a"),
        ("seed", "x"),
        ("stop_token_ids", "ab"),
        ("logit_bias", {0: "x"}),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match="Expected") as caught:
        SamplingParams(**{field: value}).validate()
    assert caught.value.param == field


def test_values_of_the_right_types_pass() -> None:
    SamplingParams(temperature=1, logit_bias={5: 1}, stop_token_ids=(3,), seed=-1, logprobs=0).validate(vocab_size=10)
