"""Index against shards: contradictions are findings, and --repair writes files that agree."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from nvfp4_runtime.checkpoint.shards import INDEX, SINGLE, Shards
from nvfp4_runtime.errors import CheckpointError, ConfigError
from tests.checkpoint.doctor.patients import UP, alarms, dequantised, edit, edit_json, found, sound

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def assert_repaired(folder, before, out):
    report = inspect_and_repair(folder, out)
    assert report.sound, report.repair.remaining
    after = dequantised(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    Shards(out)  # the strict reader opens it
    return report


def test_sound_shards_have_no_alarms(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    assert alarms(folder) == []


@pytest.mark.parametrize(
    ("id", "severity", "change"),
    [
        ("index-wrong-file", "error", lambda index: index["weight_map"].update({f"{UP}.weight": _other(index)})),
        ("index-stray-tensor", "warning", lambda index: index["weight_map"].pop(f"{UP}.weight")),
        ("index-total-size", "warning", lambda index: index["metadata"].update(total_size=7)),
    ],
)
def test_a_false_index_is_found_and_rewritten(tmp_path, id, severity, change):
    folder, _ = sound(tmp_path, shards=2)
    before = dequantised(folder)
    edit_json(folder, INDEX, change)
    assert found(inspect(folder), id).severity == severity
    report = assert_repaired(folder, before, tmp_path / "out")
    assert [c.finding for c in report.repair.changes] == [id]


def _other(index):
    return SECOND if index["weight_map"][f"{UP}.weight"] == FIRST else FIRST


def test_a_tensor_that_only_the_index_knows_stays_lost(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    edit_json(folder, INDEX, lambda index: index["weight_map"].update({"model.extra.weight": FIRST}))
    finding = found(inspect(folder), "index-missing-tensor")
    assert (finding.severity, finding.layers) == ("error", ("model.extra.weight",))
    report = inspect_and_repair(folder, tmp_path / "out")
    assert [f.id for f in report.repair.remaining] == ["index-missing-tensor"]


def test_a_missing_shard_is_a_finding_and_stays_one(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    (folder / SECOND).unlink()
    finding = found(inspect(folder), "index-missing-file")
    assert (finding.severity, finding.layers) == ("error", (SECOND,))
    assert not inspect_and_repair(folder, tmp_path / "out").sound


def test_a_tensor_in_two_shards_is_kept_where_the_index_says(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    before = dequantised(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    wrong = SECOND if index[f"{UP}.weight"] == FIRST else FIRST
    edit(folder, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(96, 32, dtype=torch.uint8)}), wrong)
    finding = found(inspect(folder), "duplicate-tensor")
    assert (finding.severity, finding.layers) == ("error", (f"{UP}.weight",))
    assert_repaired(folder, before, tmp_path / "out")


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_in_two_shards_without_index_is_kept_only_if_both_are_the_same(tmp_path, same):
    folder, _ = sound(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).unlink()
    file = index[f"{UP}.weight"]
    twin = load_file(folder / file)[f"{UP}.weight"]
    other = SECOND if file == FIRST else FIRST
    edit(folder, lambda tensors: tensors.update({f"{UP}.weight": twin if same else twin ^ 1}), other)
    report = inspect_and_repair(folder, tmp_path / "out")
    assert {f.id for f in report.findings if f.severity == "error"} == {"index-absent", "duplicate-tensor"}
    assert [f.id for f in report.repair.remaining] == ([] if same else ["duplicate-tensor"])


def test_a_file_beside_the_model_is_not_read(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    before = dequantised(folder)
    save_file({"other.weight": torch.full((4, 4), torch.nan)}, folder / "consolidated.safetensors")
    finding = found(inspect(folder), "index-stray-file")
    assert (finding.severity, finding.layers) == ("warning", ("consolidated.safetensors",))
    assert_repaired(folder, before, tmp_path / "out")
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_two_models_in_one_folder_cannot_be_decided(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    save_file({"other.weight": torch.zeros(4, 4)}, folder / SINGLE)
    assert found(inspect(folder), "index-stray-file").severity == "error"
    assert not inspect_and_repair(folder, tmp_path / "out").sound


def test_a_truncated_shard_is_unreadable(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)


def test_an_index_whose_shards_are_all_gone_is_unreadable(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match="none of them exists"):
        inspect(folder)


def test_a_folder_without_weights_is_unreadable(tmp_path):
    folder, _ = sound(tmp_path)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        inspect(folder)


def test_repair_writes_only_into_a_new_folder_and_leaves_the_original_alone(tmp_path):
    folder, _ = sound(tmp_path, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_trap.py").write_text("raise SystemExit")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ConfigError, match="not an empty folder"):
        inspect_and_repair(folder, folder)
    assert inspect_and_repair(folder, tmp_path / "out").sound
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in copied
    assert "modeling_trap.py" not in copied
    shutil.rmtree(tmp_path / "out")


def test_the_parent_must_be_a_plain_model(tmp_path):
    folder, _ = sound(tmp_path)
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="no plain matrix"):
        inspect(folder, tmp_path)
