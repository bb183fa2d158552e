"""GET /v1/precision: how every group of layers is stored and which kernel runs it in which arithmetic, and why."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from nvfp4_runtime.engine.messages import EngineInfo, LayerGroup
from server.errors import json_response
from server.openapi import ERROR_RESPONSES
from server.screen import has_weights
from server.state import ServerState

router = APIRouter()
HEAD = "lm_head"


class LayerPrecision(BaseModel):
    """Layers that are stored and run alike."""

    name: str = Field(description="The kind of layer: qkv_proj, down_proj, lm_head.")
    count: int = Field(description="How many of them.")
    stored: str = Field(description="The format of their weights: nvfp4, fp8, mxfp4, bf16.")
    bits_per_weight: float = Field(description="Scales included.")
    bytes: int
    backend: str = Field(description="Whose kernel runs them: cpu, triton, blackwell, reference.")
    numerics: str = Field(description="The arithmetic: w4a16, w4a8, w4a4, dense.")
    reason: str = Field(description="Why not a preferred kernel; empty where the first choice runs.")


class OpPrecision(BaseModel):
    """An operation without weights."""

    name: str
    count: int
    backend: str
    dtype: str
    reason: str


class KVCachePrecision(BaseModel):
    dtype: str
    bytes: int
    blocks: int = Field(description="Blocks that requests can use.")
    block_size: int = Field(description="Tokens per block.")
    tokens: int = Field(description="Tokens that fit.")
    bytes_per_token: float
    prefix_caching: bool


class Totals(BaseModel):
    weight_bytes: int = Field(description="Of all tensors of the checkpoint, as stored.")
    weight_bytes_by_format: dict[str, int]
    bits_per_weight: float = Field(description="Of the layers above, by weight; 0 without layers.")
    kv_cache_bytes: int
    scratch_bytes: dict[str, int] = Field(description="What steps hold beside these, by purpose, where measured.")


class Limits(BaseModel):
    """What the machine can do at best, where --machine-limits gave it."""

    read_bytes_per_second: float
    flops_per_second: float
    how: str


class PrecisionReport(BaseModel):
    object: str = "precision_report"
    model: str
    architecture: str
    device: str
    numerics: str = Field(description="The arithmetic of layers stored as NVFP4.")
    numerics_reason: str
    activation_dtype: str
    layers: list[LayerPrecision] = Field(description="Every group with weights but the head.")
    head: LayerPrecision | None = Field(description="The output layer; null where there is no model.")
    ops: list[OpPrecision]
    kv_cache: KVCachePrecision
    totals: Totals
    backends: dict[str, dict[str, str]]
    machine_limits: Limits | None
    system_fingerprint: str


def report(info: EngineInfo, model: str, fingerprint: str) -> PrecisionReport:
    """The report of a loaded engine."""
    stored = [_layer(group) for group in info.layers if has_weights(group) and group.num_bytes]
    blocks = info.num_blocks - 1  # block 0 is never handed out
    weights = sum(8 * layer.bytes / layer.bits_per_weight for layer in stored)
    limits = info.limits
    return PrecisionReport(
        model=model,
        architecture=info.architecture,
        device=info.device,
        numerics=info.numerics,
        numerics_reason=info.numerics_reason,
        activation_dtype=info.dtype,
        layers=[layer for layer in stored if layer.name != HEAD],
        head=next((layer for layer in stored if layer.name == HEAD), None),
        ops=[
            OpPrecision(name=op.name, count=op.count, backend=op.backend, dtype=op.numerics, reason=op.reason)
            for op in info.layers
            if not has_weights(op)
        ],
        kv_cache=KVCachePrecision(
            dtype=info.kv_dtype,
            bytes=info.kv_bytes,
            blocks=blocks,
            block_size=info.block_size,
            tokens=blocks * info.block_size,
            bytes_per_token=info.kv_bytes / (info.num_blocks * info.block_size),
            prefix_caching=info.enable_prefix_caching,
        ),
        totals=Totals(
            weight_bytes=sum(info.weight_bytes.values()),
            weight_bytes_by_format=info.weight_bytes,
            bits_per_weight=8 * sum(layer.bytes for layer in stored) / weights if weights else 0.0,
            kv_cache_bytes=info.kv_bytes,
            scratch_bytes=info.scratch_bytes,
        ),
        backends=info.backends,
        machine_limits=None
        if limits is None
        else Limits(
            read_bytes_per_second=limits.read_bytes_per_second, flops_per_second=limits.flops_per_second, how=limits.how
        ),
        system_fingerprint=fingerprint,
    )


def _layer(group: LayerGroup) -> LayerPrecision:
    return LayerPrecision(
        name=group.name,
        count=group.count,
        stored=group.stored,
        bits_per_weight=group.bits_per_weight,
        bytes=group.num_bytes,
        backend=group.backend,
        numerics=group.numerics,
        reason=group.reason,
    )


@router.get("/v1/precision", response_model=PrecisionReport, responses=ERROR_RESPONSES)
async def precision(request: Request) -> Response:
    """The precision report of the served model."""
    server = ServerState.of(request)
    return json_response(report(server.engine.info, server.model_name, server.fingerprint).model_dump())
