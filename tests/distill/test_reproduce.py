"""The reproductions measure the formats that the product writes, and their tables say what was found."""

from __future__ import annotations

import json

import pytest
import torch

from nvfp4_runtime.distill.reproduce import __main__ as command
from nvfp4_runtime.distill.reproduce import blocks, corpus, memory, scales, toy, values
from nvfp4_runtime.distill.reproduce.table import render
from nvfp4_runtime.nvfp4 import codec, mx


def relative_error(x: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((x.double() - rounded.double()).square().sum() / x.double().square().sum())


def test_the_corners_are_the_formats_of_the_product():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    scale_2 = codec.weight_scale_2(x.abs().amax())
    nvfp4 = codec.dequantize(*codec.quantize(x, scale_2), scale_2)
    mxfp4 = mx.MXFP4Weight(*mx.quantize(x)).dequantize()
    assert blocks.nmse(x, 16, "e4m3") == pytest.approx(relative_error(x, nvfp4), rel=1e-3)
    assert blocks.nmse(x, 32, "ocp") == pytest.approx(relative_error(x, mxfp4), rel=1e-6)


def test_unrounded_scales_err_least_and_larger_blocks_err_more():
    x = blocks.laplace()[: 1 << 16]
    assert blocks.nmse(x, 16, "exact") < blocks.nmse(x, 16, "e4m3") < blocks.nmse(x, 16, "ocp")
    assert blocks.nmse(x, 16, "e4m3") < blocks.nmse(x, 32, "e4m3")


def test_the_scale_error_reproduces_for_e4m3_and_says_that_it_does_not_for_e8m0():
    e4m3, e8m0, relative = scales.run()
    assert e4m3.ours.startswith("E4M3 0.0")
    assert abs(float(e4m3.ours.split()[1]) - 0.08) < 0.002
    assert (e4m3.verdict, e8m0.verdict) == ("reproduces", "does not reproduce")
    assert "E4M3 2.6%" in relative.ours


def test_memory_ratios_are_exact_for_tensors_and_smaller_for_models(monkeypatch):
    rows = {row.protocol.split(":")[0]: row for row in memory.run()}
    assert rows["Llama-3.1-8B"].ours.startswith("2.66x")
    assert next(iter(rows.values())).ours == "3.56x and 1.78x"


def test_values_without_the_default_model_say_so(monkeypatch):
    from nvfp4_runtime.errors import ConfigError

    def absent(progress):
        raise ConfigError("the package is not installed")

    monkeypatch.setattr(values, "default_bf16", absent)
    rows = values.run()
    assert [row.verdict for row in rows] == ["reproduces"] * 3 + ["cannot be measured here"]


@pytest.mark.slow
def test_a_toy_is_taught_quantised_and_distilled(monkeypatch):
    for name, value in {"PRETRAIN": 30, "POSTTRAIN": 5, "HELD": 16, "SAMPLED": 24, "BATCH": 4}.items():
        monkeypatch.setattr(toy, name, value)
    rows = toy.run(["distillation"], seeds=1, steps=4)
    assert len(rows) == 1
    assert "KL(QAT)/KL(QAD)" in rows[0].ours


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    assert command.main(["scale-error", "--json", str(tmp_path / "rows.json")]) == 0
    assert capsys.readouterr().out.strip() == render(scales.run())
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3
    with pytest.raises(SystemExit):
        command.main(["perpetual-motion"])


def test_a_corpus_leaves_out_what_is_measured(tmp_path, capsys):
    pages = tmp_path / "packages" / "anarchism" / "html"
    pages.mkdir(parents=True)
    for i in range(6):
        page = "abcdef"[i]
        text = " ".join(f"Sentence {j} of page {page} speaks of nothing much, at some length." for j in range(90))
        (pages / f"sec{i}.html").write_text(f"<html><head>no</head><p>{text}</p><pre>code</pre></html>")
    measured = tmp_path / "measured.txt"
    measured.write_text("Sentence 4 of page b speaks of nothing much, at some length. Sentence 5 of page b")
    assert corpus.main([str(tmp_path / "packages"), str(tmp_path / "out"), "--leave-out", str(measured)]) == 0
    written = [(tmp_path / "out" / f"{name}.jsonl").read_text().split("\n") for name in ("train", "held")]
    lines = [json.loads(line)["text"] for part in written for line in part if line]
    assert sorted({line.split(" of page ")[1][0] for line in lines}) == list("acdef")
    assert not any("code" in line or "no<" in line for line in lines)
    assert "1 piece(s) dropped" in capsys.readouterr().out
