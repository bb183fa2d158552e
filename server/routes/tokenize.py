"""/tokenize, /detokenize and /tokenizer_info: the text side alone, nothing is computed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nvfp4_runtime.errors import InvalidParameterError
from server.errors import json_response
from server.generation import off_loop
from server.openapi import json_responses
from server.prompts import encode_prompts, num_chars
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.routes.chat import encode
from server.state import ServerState

router = APIRouter()


@router.post("/tokenize", responses=json_responses("The tokens."), response_class=Response)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a prompt or of a chat, as the generating endpoints would have them."""
    server = ServerState.of(request)
    server.resolve_model(body.model)
    body.check()
    if body.messages is not None:
        chat = body.as_chat()
        chat.check(server.config.max_n)
        encoded = await encode(server, chat)
    else:
        prompt, special = body.prompt, body.add_special_tokens is not False
        (encoded,) = await off_loop(
            num_chars(prompt), lambda: encode_prompts(prompt, server.text.tokenizer, add_special_tokens=special)
        )
    strings = [server.text.tokenizer.raw_token(i) for i in encoded.token_ids] if body.return_token_strs else None
    return json_response(
        {
            "count": len(encoded.token_ids),
            "max_model_len": server.engine.info.max_model_len,
            "tokens": encoded.token_ids,
            "token_strs": strings,
        }
    )


@router.post("/detokenize", responses=json_responses("The text."), response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    server = ServerState.of(request)
    server.resolve_model(body.model)
    size = server.engine.info.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < size:
            raise InvalidParameterError(f"token id {token_id} is outside the vocabulary [0, {size})", "tokens")
    tokenizer = server.text.tokenizer
    text = await off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
    return json_response({"prompt": text})


@router.get("/tokenizer_info", responses=json_responses("What the tokenizer is."), response_class=Response)
async def tokenizer_info(request: Request) -> Response:
    """Vocabulary, special tokens and chat template (with --enable-tokenizer-info-endpoint; else 404)."""
    server = ServerState.of(request)
    if not server.config.enable_tokenizer_info:
        raise HTTPException(404)
    tokenizer, template = server.text.tokenizer, server.text.chat_template
    return json_response(
        {
            "tokenizer_class": "Tokenizer",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": server.engine.info.max_model_len,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
            **tokenizer.special_tokens,
            "eos_token_ids": list(tokenizer.eos_token_ids),
            "all_special_ids": sorted(tokenizer.special_ids),
            "is_byte_level": tokenizer.is_byte_level,
            "chat_template": None if template is None else template.sources.get("default"),
        }
    )
