"""The mixture of experts that a config.json asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nvfp4_runtime.config import MoEConfig
from nvfp4_runtime.models.config_values import Raw, count, flag, number, unsupported


@dataclass(frozen=True)
class Router:
    """What an architecture's name says of its mixture and its config.json does not.

    renormalise  True, or the config field that decides
    size         the config field with an expert's intermediate size
    dense        which layers have none: "none"; "listed": mlp_only_layers and decoder_sparse_step say; "first":
                 first_k_dense_replace does; "typed": mlp_layer_types does, or all but the first have one
    shared       the config field with the shared expert's size, or with the count of shared experts
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: Literal[True] | str = "norm_topk_prob"
    size: str = "moe_intermediate_size"
    dense: Literal["none", "listed", "first", "typed"] = "listed"
    shared: str | None = None
    shared_gate: bool = False


ROUTERS = {
    "MixtralForCausalLM": Router(renormalise=True, size="intermediate_size", dense="none"),
    "Qwen2MoeForCausalLM": Router(shared="shared_expert_intermediate_size", shared_gate=True),
    "Qwen3MoeForCausalLM": Router(),
    "Glm4MoeForCausalLM": Router(scoring="sigmoid", dense="first", shared="n_shared_experts"),
    "Glm4MoeLiteForCausalLM": Router(scoring="sigmoid", dense="typed", shared="n_shared_experts"),
    "Qwen3NextForCausalLM": Router(shared="shared_expert_intermediate_size", shared_gate=True),
    "Qwen3_5MoeForCausalLM": Router(
        renormalise=True, dense="none", shared="shared_expert_intermediate_size", shared_gate=True
    ),
    "MiniMaxM2ForCausalLM": Router(scoring="sigmoid", renormalise=True, size="intermediate_size", dense="none"),
    "GptOssForCausalLM": Router(renormalise=True, size="intermediate_size", dense="none"),
    "DeepseekV3ForCausalLM": Router(scoring="sigmoid", dense="first", shared="n_shared_experts"),
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def parse_moe(
    raw: Raw,
    router: Router,
    num_layers: int,
    shared_size: int | None = None,
    gated: bool = True,
    latent_size: int = 0,
) -> MoEConfig:
    """The mixture, with its field names in one spelling. Raises UnsupportedFormatError for values that cannot be.

    shared_size, gated, latent_size  as in MoEConfig, where the architecture's own reader knows better
    """
    field = next((name for name in _COUNTS if raw.get(name) is not None), _COUNTS[0])
    num_experts, top_k = count(raw, field), count(raw, "num_experts_per_tok")
    if top_k > num_experts:
        raise unsupported("num_experts_per_tok", top_k, f"at most {field} ({num_experts})")
    num_groups, top_groups = count(raw, "n_group", 1), count(raw, "topk_group", 1)
    if router.scoring == "softmax" and num_groups > 1:
        raise unsupported("n_group", num_groups, "1 for this architecture")
    if num_experts % num_groups or top_groups > num_groups or (num_groups > 1 and num_experts < 2 * num_groups):
        raise unsupported("n_group", num_groups, f"a divisor of {num_experts} experts, at least topk_group, 2 in each")
    if top_k > num_experts // num_groups * top_groups:
        raise unsupported("num_experts_per_tok", top_k, "at most the experts in topk_group groups")
    size = count(raw, router.size)
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=size,
        layers=_layers(raw, router, num_layers),
        scoring=router.scoring,
        correction_bias=router.scoring == "sigmoid",
        num_groups=num_groups,
        top_groups=top_groups,
        renormalise=router.renormalise is True or flag(raw, router.renormalise),
        scale=number(raw, "routed_scaling_factor", 1.0) if router.scoring == "sigmoid" else 1.0,
        shared_size=_shared_size(raw, router, size) if shared_size is None else shared_size,
        shared_gate=router.shared_gate,
        gated=gated,
        latent_size=latent_size,
    )


def _layers(raw: Raw, router: Router, num_layers: int) -> tuple[bool, ...]:
    if router.dense == "none":
        return (True,) * num_layers
    if router.dense == "typed" and (types := raw.get("mlp_layer_types")) is not None:
        if not isinstance(types, list) or len(types) != num_layers or not {*types} <= {"dense", "sparse"}:
            raise unsupported("mlp_layer_types", types, f'a list of {num_layers} times "dense" or "sparse"')
        return tuple(kind == "sparse" for kind in types)
    if router.dense in ("first", "typed"):
        dense = raw.get("first_k_dense_replace", 1)
        if type(dense) is not int or dense < 0:
            raise unsupported("first_k_dense_replace", dense, "a count of layers, 0 or more")
        return tuple(i >= dense for i in range(num_layers))
    step, only = count(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int and 0 <= i < num_layers for i in only):
        raise unsupported("mlp_only_layers", only, f"a list of layers from 0 to {num_layers - 1}")
    return tuple(i not in only and (i + 1) % step == 0 for i in range(num_layers))


def _shared_size(raw: Raw, router: Router, size: int) -> int:
    if router.shared is None or raw.get(router.shared) in (0, None):
        return 0
    value = count(raw, router.shared)
    return value * size if router.shared == "n_shared_experts" else value
