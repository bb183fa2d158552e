"""GET /v1/models and /v1/models/{id}: what is served, and how it is computed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import json_response
from server.openapi import json_responses
from server.screen import has_weights
from server.state import ServerState

router = APIRouter()


def model_card(server: ServerState, name: str) -> dict[str, Any]:
    """One entry in vLLM's shape; numerics, dtype, kv_cache_dtype and quantization are ours.

    An adapter's root is its folder and its parent the model's first name, as vLLM has it.
    """
    info = server.engine.info
    adapter = next((adapter for adapter in info.adapters if adapter.name == name), None)
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "nvfp4",
        "root": server.config.model_root or info.model if adapter is None else adapter.path,
        "parent": None if adapter is None else server.model_name,
        "max_model_len": info.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": server.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
        "architecture": info.architecture,
        "numerics": info.numerics,
        "numerics_reason": info.numerics_reason,
        "dtype": info.dtype,
        "kv_cache_dtype": info.kv_dtype,
        "quantization": [
            {
                "layers": group.name,
                "count": group.count,
                "stored": group.stored,
                "bits_per_weight": group.bits_per_weight,
                "kernel": group.backend,
                "numerics": group.numerics,
                "reason": group.reason,
            }
            for group in info.layers
            if has_weights(group)
        ],
    }


@router.get("/v1/models", responses=json_responses("The models."), response_class=Response)
async def list_models(request: Request) -> Response:
    """The served names, all of one model, and its LoRA adapters."""
    server = ServerState.of(request)
    names = [*server.config.served_model_names, *(adapter.name for adapter in server.engine.info.adapters)]
    return json_response({"object": "list", "data": [model_card(server, name) for name in names]})


@router.get("/v1/models/{model_id:path}", responses=json_responses("The model."), response_class=Response)
async def get_model(model_id: str, request: Request) -> Response:
    server = ServerState.of(request)
    return json_response(model_card(server, server.resolve_model(model_id)))
