"""Vision-language checkpoints: the language model in them gives its logits, wherever their files keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import UnexpectedTensorError, UnsupportedFormatError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import describe_model, load_model
from nvfp4_runtime.models.vision import CLASSES
from tests import tiny
from tests.models.paged import PagedRunner, load_or_skip
from tests.models.test_logits_match_transformers import DELTA
from tests.tiny_families import gemma3_config, gemma4_config, ministral3_config, qwen3_5_config

PROMPT = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def prefixed(tensors: tiny.Tensors, root: str, head: str) -> tiny.Tensors:
    names = {name: name.replace("model.", f"{root}.", 1) if name.startswith("model.") else name for name in tensors}
    names = {name: new.replace("backbone.", f"{root}.", 1) for name, new in names.items()}
    return {new.replace("lm_head.", f"{head}."): tensors[name] for name, new in names.items()}


# (class, its text model's config, how its config.json holds it, root, head, a tensor of the tower)
LAYOUTS: dict[str, tuple[str, tiny.Config, Callable[[tiny.Config], tiny.Config], str, str, str]] = {
    "Qwen2.5-VL, first files": (
        "Qwen2_5_VLForConditionalGeneration",
        tiny.qwen2_config(),
        lambda text: {**text, "rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "model",
        "lm_head",
        "visual.blocks.0.norm1.weight",
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        tiny.qwen3_config(),
        lambda text: {"text_config": {**text, "rope_parameters": {**MROPE, "mrope_interleaved": True}}},
        "model.language_model",
        "lm_head",
        "model.visual.patch_embed.proj.weight",
    ),
    "Qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        qwen3_5_config(),
        lambda text: {"text_config": text},
        "model.language_model",
        "lm_head",
        "model.visual.merger.norm.weight",
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        gemma3_config(),
        lambda text: {"text_config": {k: v for k, v in text.items() if k != "tie_word_embeddings"}},
        "language_model.model",
        "language_model.lm_head",
        "vision_tower.vision_model.post_layernorm.weight",
    ),
    "Mistral 3": (
        "Mistral3ForConditionalGeneration",
        ministral3_config(),
        lambda text: {"text_config": text},
        "language_model.model",
        "language_model.lm_head",
        "multi_modal_projector.norm.weight",
    ),
    "Nemotron Nano VL": (
        "NemotronH_Nano_VL_V2",
        tiny.nemotron_h_config(),
        lambda text: {"llm_config": text},
        "language_model.backbone",
        "language_model.lm_head",
        "mlp1.0.weight",
    ),
}


def _plain(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))


@pytest.mark.parametrize("nvfp4", [False, True], ids=["plain", "nvfp4"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_language_model_gives_the_same_logits_wherever_the_files_keep_it(
    tmp_path: Path, name: str, nvfp4: bool, caplog: pytest.LogCaptureFixture
) -> None:
    architecture, text, nested, root, head, tower = LAYOUTS[name]
    tensors = tiny.random_tensors(text, seed=4)
    config = {**nested({**text, "architectures": None}), "architectures": [architecture], "model_type": "vl"}
    renamed = prefixed(tensors, root, head) | {tower: torch.ones(3, 3)}
    if nvfp4:
        alone = tiny.write_modelopt(tmp_path / "text", text, tensors, shards=2)
        packed = tiny.pack_tensors(tensors, ("lm_head", "model.embed_tokens"), 0.01, None, True)
        section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [head, tower.rpartition(".")[0]]}
        vl = tiny.write_plain(
            tmp_path / "vl",
            {**config, "quantization_config": section},
            prefixed(packed, root, head) | {tower: torch.ones(3, 3)},
            shards=3,
        )
    else:
        alone = tiny.write_plain(tmp_path / "text", text, tensors)
        vl = tiny.write_plain(tmp_path / "vl", config, renamed, shards=2)
    with caplog.at_level("INFO"):
        model = _plain(vl)
    assert f"{architecture}: its language model alone is run" in caplog.text
    found, expected = (PagedRunner(m).run((0, PROMPT))[0] for m in (model, _plain(alone)))
    assert torch.equal(found, expected)


def test_every_class_is_known_by_its_text_model_and_leaves_no_other_tensor_unread(tmp_path: Path) -> None:
    makers = {
        "Nemotron": tiny.nemotron_h_config,
        "Gemma3": gemma3_config,
        "Gemma4": gemma4_config,
        "Qwen3_5": qwen3_5_config,
    }
    for name, vision in CLASSES.items():
        make = next((makers[start] for start in makers if vision.text.startswith(start)), tiny.llama_config)
        inner = make()
        if "Moe" in vision.text:
            inner |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        described = describe_model({"architectures": [name], vision.fields[-1]: inner})
        assert (described.architecture, described.vision_class) == (vision.text, name)
    config = tiny.qwen3_config()
    tensors = prefixed(tiny.random_tensors(config), "model.language_model", "lm_head") | {
        "model.ears.weight": torch.ones(2)
    }
    raw = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": config}
    with pytest.raises(UnexpectedTensorError, match=r"model\.ears\.weight"):
        _plain(tiny.write_plain(tmp_path, raw, tensors))


def test_a_text_config_that_is_none_is_refused_by_name() -> None:
    raw = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": "qwen3"}
    with pytest.raises(UnsupportedFormatError, match="text_config is 'qwen3'"):
        describe_model(raw)


TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2_5_VL": ({**TEXT, "rope_parameters": MROPE}, QWEN_TOWER),
    "Qwen3VL": ({**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}}, QWEN_TOWER),
    "Qwen3_5Moe": (
        {**TEXT, **DELTA, **EXPERTS, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0]}},
        QWEN_TOWER,
    ),
    "Gemma3": ({**TEXT, "sliding_window": 16, "num_hidden_layers": 6}, SIGLIP),
}


@pytest.mark.parametrize("family", THEIRS)
def test_logits_equal_those_of_transformers_own_class(tmp_path: Path, family: str) -> None:
    """Text through the whole vision-language module, as transformers 5 saves it."""
    transformers = pytest.importorskip("transformers")
    text, tower = THEIRS[family]
    config = getattr(transformers, f"{family}Config")(text_config=dict(text), vision_config=dict(tower))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
        expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    assert float(expected.std()) > 0.1
    folder = tiny.save_transformers(tmp_path, model)
    found = PagedRunner(load_or_skip(folder)).run((0, PROMPT))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
