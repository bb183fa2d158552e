"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.fields import Int, Prompt, ShortStr, note_unknown


class EmbeddingRequest(BaseModel):
    """OpenAI's fields, and vLLM's for fitting the prompt. null means the default, everywhere.

    pooling  ours: "last" (the last token's hidden state) or "mean" (the average over the prompt's tokens)
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    prompt_field: ClassVar[str] = "input"

    model: ShortStr | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = None
    user: ShortStr | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] = "left"
    priority: Int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    pooling: Literal["mean", "last"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    def check(self) -> None:
        """Refuse what no decoder's hidden states can give. Raises InvalidParameterError naming the field."""
        note_unknown("", self)
        if self.dimensions is not None:
            raise InvalidParameterError(
                "dimensions is not supported: this model was not trained for shortened embeddings; leave it out",
                "dimensions",
            )
