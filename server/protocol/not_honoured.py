"""Known fields that are not honoured: a 400 that names them. Unknown extras pass."""

from __future__ import annotations

from typing import Any

# Fields of vLLM's contract that are not honoured yet, with the values that ask for nothing. null always does.
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "session_id": (),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
}
# What older clients of vLLM and OpenAI send, by the name that took its place.
_STRUCTURED = "structured_outputs took its place"
REPLACED = {
    "functions": "tools took its place",
    "function_call": "tool_choice took its place",
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
}
NOT_HONOURED |= dict.fromkeys(REPLACED, ())
NOT_HONOURED_COMPLETION: dict[str, tuple[Any, ...]] = {"suffix": ("",), "prompt_embeds": ()}
NOT_HONOURED_CHAT: dict[str, tuple[Any, ...]] = {
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_assistant_tokens_mask": (False,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}
