"""Tiny models for training: random Llamas, and the eager functions, which need no compiler's seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.distill import compilation
from nvfp4_runtime.distill.trainer import Schedule, Trainer
from nvfp4_runtime.distill.wishes import Wishes
from nvfp4_runtime.quantize.pipeline import quantize_folder
from tests import tiny

TEXT = "".join(f"The {i}th sentence of a text that nobody wrote, {i * i} words, {i % 7} lines.\n" for i in range(90))
SCHEDULE = Schedule(lr=3e-3, warmup=2, eval_every=6, seed=1)


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """The process asks itself to end while the step after `step` is made."""
    original = Trainer._one_step

    def killed(trainer: Trainer) -> dict[str, float]:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", killed)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine wait for each other's turn at every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(compilation, "_has_compiler", lambda: False)
    compilation.compiled.cache_clear()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BF16 Llama whose inputs have channels of different size, so that AWQ has something to fold."""
    config = tiny.llama_config(dtype="bfloat16")
    tensors = tiny.random_tensors(config)
    spread = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] *= spread
    folder = tmp_path_factory.mktemp("distill") / "teacher"
    return tiny.write_plain(folder, config, {name: t.to(torch.bfloat16) for name, t in tensors.items()})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def awq(teacher: Path) -> Path:
    pytest.importorskip("transformers")
    out = teacher.with_name("awq")
    quantize_folder(teacher, out, method="awq", calib_texts=[TEXT[:3000]], numerics="w4a4", progress=False)
    return out


@pytest.fixture(scope="session")
def plainly(teacher: Path) -> Path:
    """The teacher quantised by `max`."""
    out = teacher.with_name("max")
    quantize_folder(teacher, out, method="max", calib_texts=[TEXT[:3000]], progress=False)
    return out


@pytest.fixture
def wishes(text: Path, plainly: Path) -> Wishes:
    """24 steps of 4 rows of 48 bytes, W4A4 from `max`."""
    return Wishes(
        data=str(text), student=plainly, seq=48, tokens=24 * 192, batch_tokens=192, micro_tokens=96, held_rows=8,
        schedule=SCHEDULE, progress=False,
    )  # fmt: skip
