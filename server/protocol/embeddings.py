"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.fields import Int, Number, Prompt, RequestBody, ShortStr, note_unknown


class EmbeddingRequest(RequestBody):
    """OpenAI's fields, and vLLM's for fitting the prompt. null means the default, everywhere.

    pooling  ours: "last" (the last token's hidden state) or "mean" (the average over the prompt's tokens)
    """

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
    timeout: Number | None = None

    def check(self) -> None:
        """Refuse what no decoder's hidden states can give. Raises InvalidParameterError naming the field."""
        note_unknown("", self)
        if self.dimensions is not None:
            raise InvalidParameterError(
                "dimensions is not supported: this model was not trained for shortened embeddings; leave it out",
                "dimensions",
            )
