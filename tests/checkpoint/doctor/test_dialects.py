"""One model in every dialect: every layer is measured, none has an error, each equals what it was written from."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from tests import dialects

MODEL = dialects.tiny_model()
DIALECTS = dialects.dialects(MODEL)
# Calibrated by nobody: the writers give every layer the same input_scale.
UNCALIBRATED = "input-scale-constant"
ODD = {
    "modelopt nvfp4, declared by nobody": {UNCALIBRATED, "quantised-undeclared"},
    "modelopt awq, q and k apart": {UNCALIBRATED, "sibling-scales-differ"},
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return DIALECTS["plain fp32"].save(tmp_path_factory.mktemp("parent") / "m", MODEL)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_measured_and_equals_its_model(tmp_path: Path, name: str, parent: Path) -> None:
    report = inspect(DIALECTS[name].save(tmp_path / "m", MODEL), parent)
    layers = {layer.name: layer for layer in report.layers}
    quantised = [layers[module] for module in MODEL.matrices if layers[module].sqnr_db is not None]
    plain = [layers[module] for module in MODEL.matrices if layers[module].stored in ("bf16", "fp16", "fp32")]
    assert len(quantised) + len(plain) == len(MODEL.matrices)
    assert all(layer.sqnr_db == 999 and layer.relative_error == 0 for layer in quantised)
    assert report.parent is not None
    assert report.parent.missing == ()
    alarms = {finding.id for finding in report.findings if finding.severity != "info"}
    assert alarms <= ODD.get(name, {UNCALIBRATED})
    weight_only = "a16" in name or "fp8" in name or "mx" in name or "plain" in name
    assert (UNCALIBRATED in alarms) == (not weight_only and name != "modelopt mixed")
