"""What a chat request says of reasoning."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, PrivateAttr

from nvfp4_runtime.errors import InvalidParameterError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
SWITCHES = ("enable_thinking", "thinking")  # by either name templates turn reasoning on and off


class ReasoningFields(BaseModel):
    """include_reasoning  False: leave the reasoning out of the answer
    reasoning_effort      how hard to think, for templates that read it; "none": not at all
    """

    include_reasoning: bool = True
    reasoning_effort: Effort | None = None
    _asks_for_reasoning: bool = PrivateAttr(False)

    def ask_for_reasoning(self) -> None:
        """Turn it on where the template has a switch for it."""
        self._asks_for_reasoning = True

    def effort_variables(self, known: frozenset[str]) -> dict[str, Any]:
        """Variables for a template that reads the `known` ones. InvalidParameterError where it reads no effort."""
        switched = {name: True for name in SWITCHES if name in known} if self._asks_for_reasoning else {}
        effort = self.reasoning_effort
        if effort is None:
            return switched
        if "reasoning_effort" in known:
            return {**switched, "reasoning_effort": effort}
        if effort == "none":  # without a switch, a budget of no tokens sees to it
            return {name: False for name in SWITCHES if name in known}
        raise InvalidParameterError(
            f"reasoning_effort: this model's chat template does not read it, so {effort!r} would change nothing; leave "
            "it out (none is possible)",
            "reasoning_effort",
        )
