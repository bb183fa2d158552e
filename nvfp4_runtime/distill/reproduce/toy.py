"""A post-trained toy: how far distillation and training on labels each leave the model they start from.

A byte-level Llama of half a million parameters, three layers, trained from scratch on Python source (A) and English
prose about Python (E), both of the standard library; then "post-trained": sharpened towards the square of its own
distribution, as the entropy losses of reinforcement learning do. That is the teacher. Its NVFP4 students (max, W4A4 on
every block linear, frozen tensor scales) learn by the product's own trainer. Toy scale: directions, not sizes.
"""

from __future__ import annotations

import json
import logging
import pydoc_data.topics
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nvfp4_runtime.distill.data import Rows, indices
from nvfp4_runtime.distill.hf import head_weight, hidden_states, load_plain, new_model
from nvfp4_runtime.distill.loss import Loss
from nvfp4_runtime.distill.reproduce.table import Row
from nvfp4_runtime.distill.student import build_student
from nvfp4_runtime.distill.trainer import Schedule, Trainer, measure
from nvfp4_runtime.nvfp4.codec import SCALE_2_DENOMINATOR
from nvfp4_runtime.quantize.ptq import quantize_checkpoint

logger = logging.getLogger(__name__)

CONTEXT, BATCH = 96, 12
PRETRAIN, POSTTRAIN, STEPS, LR = 700, 120, 150, 3e-4
HELD, SAMPLED = 96, 384
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Rows of bytes; E is prose, A source."""

    train_a: Rows
    train_e: Rows
    held_a: Rows
    held_e: Rows


def run(claims: Sequence[str], *, seeds: int, steps: int) -> list[Row]:
    """The rows of "distillation" and "robustness", each over `seeds` toys of their own."""
    texts, found = load_texts(), dict[str, list[dict[str, float]]]()
    kinds = ["ptq", "qad", "qat"] if "distillation" in claims else ["ptq", "qad"]
    if "robustness" in claims:
        kinds += ["qad A only", "qad sampled", "qad random"]
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="nvfp4-toy-") as folder:
            for kind, figures in one_toy(Path(folder), texts, seed, steps, kinds).items():
                found.setdefault(kind, []).append(figures)
                logger.info("seed %d, %s: %s", seed, kind, figures)
    protocol = (
        f"toy of {seeds} seeds, {steps} steps of {BATCH} rows of {CONTEXT} bytes, LR {LR:g}, same start, order, steps; "
        "held-out source (A) and prose (E), mean and standard deviation over seeds"
    )
    rows = []
    if "distillation" in claims:
        ratio = [qat["kl E"] / qad["kl E"] for qat, qad in zip(found["qat"], found["qad"], strict=True)]
        told = "; ".join(f"{kind.upper()} {_cell(found[kind])}" for kind in ("ptq", "qat", "qad"))
        good = min(ratio) > 1 and all(q["kl E"] < p["kl E"] for q, p in zip(found["qad"], found["ptq"], strict=True))
        rows.append(
            Row(
                "KL(QAD) far below KL(QAT) on a post-trained model, QAT drifting (published: 0.004 against 0.311, 78x)",
                protocol,
                f"{told}. KL(QAT)/KL(QAD) on E {mean(ratio):.1f}x ({min(ratio):.1f} to {max(ratio):.1f})",
                "reproduces" if good else "does not reproduce",
            )
        )
    if "robustness" in claims:
        for kind, claim in (
            ("qad A only", "QAD on one domain recovers the other"),
            ("qad sampled", "QAD on the teacher's own samples recovers"),
            ("qad random", "QAD on random tokens does not break the model"),
        ):
            better = [q["kl E"] < p["kl E"] for q, p in zip(found[kind], found["ptq"], strict=True)]
            harmless = mean(q["kl E"] for q in found[kind]) <= 1.05 * mean(p["kl E"] for p in found["ptq"])
            good = all(better) or (kind == "qad random" and harmless)
            rows.append(
                Row(
                    claim,
                    protocol,
                    f"{_cell(found[kind])}; PTQ {_cell(found['ptq'])}; full data {_cell(found['qad'])}. Better than "
                    f"PTQ on E in {sum(better)} of {len(better)} seeds",
                    "reproduces" if good else "in part" if any(better) else "does not reproduce",
                )
            )
    return rows


def _cell(runs: Sequence[dict[str, float]]) -> str:
    def told(name: str) -> str:
        values = [figures[name] for figures in runs]
        return f"{mean(values):.4f}" + (f"±{stdev(values):.4f}" if len(values) > 1 else "")

    return f"KL A {told('kl A')}, E {told('kl E')}, CE E {mean(f['ce E'] for f in runs):.3f}"


def load_texts() -> Texts:
    """Source and prose of the running Python's standard library, cut into rows; every eighth row is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    source = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))[: 1 << 21]
    prose = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
    parts = []
    for text in (source, prose):
        count = len(text) // CONTEXT
        ids = np.frombuffer(text[: count * CONTEXT], dtype=np.uint8).astype(np.int32).reshape(count, CONTEXT)
        rng = np.random.default_rng(0)
        ids = ids[rng.permutation(count)]
        parts.append((Rows(ids[HELD:]), Rows(ids[:HELD])))
    (train_a, held_a), (train_e, held_e) = parts
    return Texts(train_a, train_e, held_a, held_e)


def one_toy(work: Path, texts: Texts, seed: int, steps: int, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Figures of every kind on both domains, all from one teacher."""
    teacher = make_teacher(work / "teacher", texts, seed)
    start = post_training_quantised(work / "teacher", work / "ptq", teacher, texts)
    both = _mix(texts.train_a, texts.train_e)
    found = dict[str, dict[str, float]]()
    for kind in kinds:
        student = build_student(work / "teacher", start, "w4a4")
        if kind != "ptq":
            rows = {
                "qad A only": lambda: texts.train_a,
                "qad sampled": lambda: _sampled(teacher, seed),
                "qad random": lambda: _random(seed),
            }.get(kind, lambda: both)()
            loss: Loss = "ce" if kind == "qat" else "kl"
            schedule = Schedule(
                loss=loss, steps=steps, batch_rows=BATCH, micro_rows=BATCH, lr=LR, warmup=10, seed=seed,
                eval_every=steps, save_minutes=1e9,
            )  # fmt: skip
            Trainer(
                teacher, student, rows, texts.held_a.first(8), schedule, work / kind.replace(" ", "-"), progress=False
            ).run()
        figures = {
            name: measure(student.model, teacher, held) for name, held in (("A", texts.held_a), ("E", texts.held_e))
        }
        found[kind] = {f"{what} {name}": figures[name][what] for name in figures for what in ("kl", "ce", "top1")}
    return found


def make_teacher(folder: Path, texts: Texts, seed: int) -> nn.Module:
    """Trained from scratch on both texts, sharpened, saved as a plain BF16 folder and read back."""
    torch.manual_seed(seed)
    model = new_model(CONFIG)
    rows = _mix(texts.train_a, texts.train_e)
    _fit(model, rows, PRETRAIN, 3e-3, seed, None)
    before: Any = new_model(CONFIG)
    before.load_state_dict(model.state_dict())
    _fit(model, rows, POSTTRAIN, 5e-4, seed + 1000, before.eval())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}), encoding="utf-8")
    save_file(
        {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors"
    )
    return load_plain(folder, torch.bfloat16, torch.device("cpu"))


def _fit(model: nn.Module, rows: Rows, steps: int, lr: float, seed: int, sharpen: nn.Module | None) -> None:
    """Next-byte training; with `sharpen`, towards the square of that model's distribution, normalised."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = Schedule(steps=steps, lr=lr, warmup=20)
    for step in range(steps):
        ids = rows.batch(indices(step * BATCH, BATCH, len(rows), seed), torch.device("cpu"))
        logits = (hidden_states(model, ids) @ head_weight(model).t()).reshape(*ids.shape, -1)[:, :-1].flatten(0, 1)
        if sharpen is None:
            loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = (hidden_states(sharpen, ids) @ head_weight(sharpen).t()).reshape(*ids.shape, -1)[:, :-1]
                target = (2 * wanted).flatten(0, 1).softmax(dim=-1)
            loss = nn.functional.cross_entropy(logits, target)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()


def post_training_quantised(teacher_folder: Path, out: Path, teacher: nn.Module, texts: Texts) -> Path:
    """`max`, with input scales measured on rows of both texts."""
    largest = dict[str, float]()
    hooks = []
    for name, module in teacher.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def watch(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

            hooks.append(module.register_forward_pre_hook(watch))
    with torch.no_grad():
        hidden_states(teacher, _mix(texts.train_a, texts.train_e).batch(list(range(64)), torch.device("cpu")))
    for hook in hooks:
        hook.remove()
    scales = {name: value / SCALE_2_DENOMINATOR for name, value in largest.items()}
    quantize_checkpoint(teacher_folder, out, method="max", input_scales=scales, progress=False)
    return out


def _mix(a: Rows, b: Rows) -> Rows:
    """Alternating rows, as many of each."""
    count = min(len(a), len(b))
    return Rows(np.stack([a.ids[:count], b.ids[:count]], axis=1).reshape(2 * count, -1))


def _sampled(teacher: Any, seed: int) -> Rows:
    """What the teacher says by itself, from one random byte on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, 127, (SAMPLED, 1), generator=generator)
    with torch.no_grad():
        while ids.shape[1] < CONTEXT:
            hidden = hidden_states(teacher, ids).reshape(SAMPLED, ids.shape[1], -1)[:, -1]
            p = (hidden @ head_weight(teacher).t()).float().softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return Rows(ids.to(torch.int32).numpy())


def _random(seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(rng.integers(0, 256, (2048, CONTEXT), dtype=np.int32))
