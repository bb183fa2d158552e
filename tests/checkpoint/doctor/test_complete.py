"""Files against what the model reads: whatever the loader refuses is an error here, and --repair does not hide it."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from nvfp4_runtime.errors import CheckpointError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.expected import expected
from tests.checkpoint.doctor.patients import DOWN, UP, Q, edit, edit_json, found, sound
from tests.tiny import (
    glm4_moe_config,
    mixtral_config,
    qwen2_moe_config,
    qwen3_moe_config,
    random_tensors,
    write_modelopt,
    write_plain,
)

DOWN_1 = DOWN.replace("layers.0", "layers.1")


def errors(folder):
    return {finding.id for finding in inspect(folder, expect=expected).findings if finding.severity == "error"}


def assert_the_loader_refuses(folder):
    with pytest.raises(CheckpointError):
        load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))


def test_a_sound_model_lacks_nothing_and_loads(tmp_path):
    folder, parent = sound(tmp_path)
    for path in (folder, parent):
        assert errors(path) == set()
        load_model(Checkpoint.open(path), Kernels([ReferenceBackend()], "float32"))


@pytest.mark.parametrize(
    "module", [DOWN_1, "model.norm", "model.layers.0.input_layernorm", "model.embed_tokens", "lm_head"]
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_module_is_an_error_and_stays_one_in_the_copy(tmp_path, module, which):
    folder = sound(tmp_path)[which]
    if module == "lm_head":  # `head-missing` speaks only where config.json says that it is not tied
        edit_json(folder, "config.json", lambda c: c.pop("tie_word_embeddings"))
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"{module}.")])
    finding = found(inspect(folder, expect=expected), "tensor-missing")
    assert (finding.severity, finding.layers) == ("error", (module,))
    repaired = inspect_and_repair(folder, tmp_path / "out", expect=expected)
    assert "tensor-missing" in [f.id for f in repaired.repair.remaining]
    assert not repaired.sound
    assert_the_loader_refuses(folder)


def test_a_weight_of_which_only_the_scales_are_left_is_lost_not_an_orphan(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.pop(f"{UP}.weight"))
    for expect in ({"expect": expected}, {}):
        report = inspect(folder, **expect)
        assert found(report, "tensor-missing").layers == (UP,)
        assert "orphan-tensor" not in [f.id for f in report.findings]
        assert not inspect_and_repair(folder, tmp_path / f"out{len(expect)}", **expect).sound
    assert_the_loader_refuses(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("intermediate_size", 192), ("vocab_size", 321), ("num_key_value_heads", 4), ("hidden_size", 128)],
)
@pytest.mark.parametrize("which", [0, 1])
def test_sizes_that_config_json_does_not_imply_are_errors(tmp_path, field, value, which):
    folder = sound(tmp_path)[which]
    edit_json(folder, "config.json", lambda c: c.update({field: value}))
    assert errors(folder) == {"shape-mismatch"}
    assert not inspect_and_repair(folder, tmp_path / "out", expect=expected).sound
    assert_the_loader_refuses(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{UP}.weight", lambda t: t.t().contiguous()),
        ("lm_head.weight", lambda t: t.reshape(2, 160, 64)),
        ("model.norm.weight", lambda t: t.reshape(1, 64)),
        ("model.embed_tokens.weight", lambda t: t[:100]),
    ],
)
def test_a_weight_that_lies_otherwise_is_an_error(tmp_path, name, change):
    _, parent = sound(tmp_path)
    edit(parent, lambda tensors: tensors.update({name: change(tensors[name])}))
    finding = found(inspect(parent, expect=expected), "shape-mismatch")
    assert finding.layers == (name.removesuffix(".weight"),)
    assert_the_loader_refuses(parent)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{UP}.input_scale", torch.full((3,), 0.012)),
        (f"{UP}.weight_scale_2", torch.full((96,), 0.001)),
        (f"{UP}.input_scale", torch.tensor(0.012, dtype=torch.float64)),
    ],
)
def test_scales_of_another_size_or_type_are_unreadable(tmp_path, name, tensor):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.update({name: tensor}))
    finding = found(inspect(folder), "layer-unreadable")
    assert (finding.severity, finding.layers) == ("error", (UP,))
    assert name.rpartition(".")[2] in finding.message
    assert_the_loader_refuses(folder)


@pytest.mark.parametrize("name", [f"{UP}.bias", "model.layers.0.mlp.router.weight", "model.layers.0.mixer.A_log"])
def test_tensors_that_the_model_does_not_read_are_errors(tmp_path, name):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(96, dtype=torch.bfloat16)}))
    assert found(inspect(folder, expect=expected), "tensor-unexpected").layers == (name,)
    assert_the_loader_refuses(folder)


def test_tensors_that_the_loader_excuses_are_not(tmp_path):
    folder, _ = sound(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert errors(folder) == set()
    load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))


def test_a_served_architecture_with_another_activation_is_refused(tmp_path):
    folder, _ = sound(tmp_path)
    edit_json(folder, "config.json", lambda c: c.update(hidden_act="gelu"))
    assert "gelu" in found(inspect(folder, expect=expected), "format-unsupported").message
    assert_the_loader_refuses(folder)


def test_layers_of_an_unknown_architecture_are_held_against_each_other(tmp_path):
    folder, _ = sound(tmp_path, experts=True, num_hidden_layers=4)
    assert errors(folder) == set()
    edit(folder, lambda tensors: tensors.pop("model.layers.2.input_layernorm.weight"))
    finding = found(inspect(folder, expect=expected), "tensor-missing")
    assert (finding.severity, finding.layers) == ("error", ("model.layers.2.input_layernorm",))
    assert "not served here" in finding.message


def test_layers_of_another_kind_lack_nothing(tmp_path):
    folder, _ = sound(tmp_path, experts=True, num_hidden_layers=4)

    def mixed(tensors):
        """The first layer a state space, without attention."""
        for name in [n for n in tensors if n.startswith("model.layers.0.self_attn.")]:
            del tensors[name]
        tensors["model.layers.0.mixer.in_proj.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)

    edit(folder, mixed)
    assert "tensor-missing" not in errors(folder)
    assert Q not in [layer.name for layer in inspect(folder).layers]


def test_a_layer_number_of_thousands_of_digits_is_only_a_name(tmp_path):
    folder, _ = sound(tmp_path)
    name = f"model.layers.{'9' * 5000}.input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(64, dtype=torch.bfloat16)}))
    assert errors(folder) == {"tensor-unexpected"}


@pytest.mark.parametrize("config", [mixtral_config(), qwen2_moe_config(), qwen3_moe_config(), glm4_moe_config()])
def test_served_mixtures_are_sound_and_a_lost_expert_is_named(tmp_path, config):
    folder = write_modelopt(tmp_path, config, random_tensors(config, dtype=torch.bfloat16))
    assert errors(folder) == set()
    block = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    lost = f"model.layers.1.{block}.experts.2.{'w2' if block == 'block_sparse_moe' else 'down_proj'}"

    def lose(tensors):
        for name in [name for name in tensors if name.startswith(f"{lost}.")]:
            del tensors[name]

    edit(folder, lose)
    assert lost in found(inspect(folder, expect=expected), "tensor-missing").layers
    assert_the_loader_refuses(folder)


def test_stacked_experts_of_another_size_are_named(tmp_path):
    config = qwen3_moe_config()
    tensors = random_tensors(config, dtype=torch.bfloat16)
    for prefix in [f"model.layers.{i}.mlp.experts" for i in range(2)]:
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{name}.weight") for expert in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = torch.cat([gate, up], dim=1), down
    folder = write_plain(tmp_path, config, tensors)
    assert errors(folder) == set()
    edit_json(folder, "config.json", lambda c: c.update(moe_intermediate_size=16))
    assert errors(folder) == {"shape-mismatch"}
    assert_the_loader_refuses(folder)
