"""Vision-language checkpoints, of which the language model alone is run: their config.json made a decoder's, where its
tensors lie, and which tensors are left unread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nvfp4_runtime.config import ModelConfig
from nvfp4_runtime.models.config_values import Raw, unsupported

if TYPE_CHECKING:
    from nvfp4_runtime.checkpoint.checkpoint import Checkpoint

UNREAD = "sees images (or hears), and this server takes text alone: content of another kind is refused"


@dataclass(frozen=True)
class Vision:
    """What a vision-language class holds beside its decoder.

    text    the decoder's class; `texts` where the inner model_type tells of another
    fields  of config.json that may hold the decoder's own; none there: they lie at the top (Qwen2.5-VL's first files)
    towers  patterns of the tensors that are not the decoder's
    """

    text: str
    towers: tuple[str, ...]
    texts: Mapping[str, str] | None = None
    fields: tuple[str, ...] = ("text_config",)


_QWEN = ("visual.*", "model.visual.*")
_LLAVA = tuple(
    f"{prefix}{name}"
    for prefix in ("", "model.")
    for name in ("vision_tower.*", "multi_modal_projector.*", "vision_model.*")
)
_GEMMA4 = ("model.embed_vision.*", "model.embed_audio.*", "model.audio_tower.*")
_NEMOTRON = Vision(
    "NemotronHForCausalLM",
    (*_LLAVA, "vision_final_layernorm.*", "mlp1.*", "sound_*", "audio_*"),
    fields=("text_config", "llm_config"),
)
CLASSES = {
    "Qwen2VLForConditionalGeneration": Vision("Qwen2ForCausalLM", _QWEN),
    "Qwen2_5_VLForConditionalGeneration": Vision("Qwen2ForCausalLM", _QWEN),
    "Qwen3VLForConditionalGeneration": Vision("Qwen3ForCausalLM", _QWEN),
    "Qwen3VLMoeForConditionalGeneration": Vision("Qwen3MoeForCausalLM", _QWEN),
    "Qwen3_5ForConditionalGeneration": Vision("Qwen3_5ForCausalLM", _QWEN),
    "Qwen3_5MoeForConditionalGeneration": Vision("Qwen3_5MoeForCausalLM", _QWEN),
    "Gemma3ForConditionalGeneration": Vision("Gemma3ForCausalLM", _LLAVA),
    "Gemma4ForConditionalGeneration": Vision("Gemma4ForCausalLM", (*_LLAVA, *_GEMMA4)),
    "Mistral3ForConditionalGeneration": Vision(
        "MistralForCausalLM", _LLAVA, texts={"ministral3": "Ministral3ForCausalLM"}
    ),
    "NemotronH_Nano_VL_V2": _NEMOTRON,
    "NemotronH_Omni_Reasoning_V3": _NEMOTRON,
}
_ROOTS = ("model", "backbone")
_INNER_ROOTS = ("model.language_model", "language_model.model", "language_model.backbone", *_ROOTS)
_HEADS = ("language_model.lm_head", "lm_head")


def text_config(raw: Raw) -> Raw:
    """The decoder's config.json: `raw` itself unless its class is one of these, then its inner values, with those that
    may stand outside. Raises UnsupportedFormatError where the inner ones are none."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    vision = CLASSES.get(name)
    if vision is None:
        return raw
    inner = next((raw[field] for field in vision.fields if raw.get(field) is not None), raw)
    if not isinstance(inner, Mapping):
        raise unsupported(vision.fields[0], inner, "the values of a language model")
    text = (vision.texts or {}).get(str(inner.get("model_type")), vision.text)
    flat: dict[str, Any] = {**inner, "architectures": [text], "vision_class": name}
    for field in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id"):
        if flat.get(field) is None:
            flat[field] = raw.get(field)
    ties = [part["tie_word_embeddings"] for part in (raw, inner) if part.get("tie_word_embeddings") is not None]
    if ties:  # files of transformers 4 say it inside, those of 5 outside and leave the class's false inside
        flat["tie_word_embeddings"] = next((tie for tie in ties if tie is not False), False)
    if name == "Qwen3VLMoeForConditionalGeneration":
        flat["norm_topk_prob"] = True  # its class always does
    for field in ("rope_parameters", "rope_scaling"):
        if isinstance(flat.get(field), Mapping):
            flat[field] = _along_text(flat[field])
    return flat


def located(config: ModelConfig, ckpt: Checkpoint) -> ModelConfig:
    """`config` with the places of decoder and head in the files."""
    roots = _INNER_ROOTS if config.vision_class else _ROOTS
    leaves = ("embed_tokens.weight", "embeddings.weight")
    root = next((root for root in roots for leaf in leaves if ckpt.has(f"{root}.{leaf}")), config.root)
    names: Iterable[str] = ckpt.names() if config.vision_class else ()
    outer = any(name.startswith(f"{_HEADS[0]}.") for name in names)
    return replace(config, root=root, head=_HEADS[0] if outer else config.head)


def unread(config: ModelConfig) -> dict[str, str]:
    """Patterns of tensors that are not the decoder's, and why they stay unread."""
    return dict.fromkeys(CLASSES[config.vision_class].towers, UNREAD) if config.vision_class else {}


def towers(raw: Raw) -> tuple[str, ...]:
    """Patterns of the tensors in a vision-language checkpoint that are not the decoder's; () of any other."""
    names = raw.get("architectures")
    vision = CLASSES.get(str(names[0])) if isinstance(names, list) and names else None
    return () if vision is None else vision.towers


def _along_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as text meets it: along it the axes of an image all count the same tokens."""
    plain = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    return {name: "default" if value == "mrope" else value for name, value in plain.items()}
