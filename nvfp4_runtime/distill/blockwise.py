"""Block by block, for models larger than memory: each decoder layer learns to give what it gives unquantised.

In memory are one layer twice (plain, and the student's), its optimizer, and the hidden states of the text. A layer's
inputs are what the student's layers before it give, so that it also learns to mend what they did. No teacher is
loaded, no distribution compared: cheaper than `full`, and less exact.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.distill import state
from nvfp4_runtime.distill.data import Rows, indices
from nvfp4_runtime.distill.export import Rounding, export
from nvfp4_runtime.distill.fake_quant import max_block_scales
from nvfp4_runtime.distill.hf import empty_model
from nvfp4_runtime.distill.start import starting_weights
from nvfp4_runtime.distill.student import BlockScales, Layer, gather, nvfp4_weights, plain_tensors, swap
from nvfp4_runtime.distill.trainer import Schedule, diverged, not_finite
from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

logger = logging.getLogger(__name__)

FIELDS = ("layer", "step", "before", "after")


@dataclass(frozen=True)
class BlockResult:
    """Squared error of one layer's output on held-out rows, by what the layer adds: at the start, and at best."""

    layer: int
    step: int
    before: float
    after: float


class Blockwise:
    """One run in the folder `work`: a file for each finished layer, from which it goes on."""

    def __init__(
        self,
        teacher: Path,
        student: Path,
        numerics: Numerics,
        rows: Rows,
        held: Rows,
        schedule: Schedule,
        work: Path,
        *,
        device: torch.device,
        block_scales: BlockScales = "frozen",
        dtype: torch.dtype = torch.bfloat16,
        progress: bool = True,
    ) -> None:
        """Raises UnsupportedFormatError for a model that is not a stack of decoder layers with full attention."""
        self.shards, self.ckpt, self.folder = Shards(teacher), Checkpoint.open(student), student
        self.model: Any = empty_model(teacher, dtype)
        self.numerics, self.schedule, self.work, self.device = numerics, schedule, work, device
        self.policy, self.dtype, self.progress = block_scales, dtype, progress
        config: Any = self.model.config
        self.layers: Any = getattr(self.model.base_model, "layers", None)
        if self.layers is None or not hasattr(self.model.base_model, "rotary_emb"):
            raise UnsupportedFormatError(
                f"{type(self.model).__name__} is not a stack of decoder layers behind one rotary embedding; distil it "
                "with --mode full"
            )
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) and window is not None and window < rows.length:
            raise ConfigError(
                f"rows of {rows.length} tokens are longer than the model's attention window ({window}); shorten them",
                "--seq",
            )
        self.heads = int(config.num_attention_heads)
        base: Any = self.model.base_model
        rotary: Any = type(base.rotary_emb)(config).to(device)
        self.positions = torch.arange(rows.length, device=device).unsqueeze(0)
        self.rope = rotary(torch.empty(1, 1, 1, dtype=dtype, device=device), self.positions)
        embedding = self.shards.read("model.embed_tokens.weight").to(device=device, dtype=dtype)
        scale = float(getattr(base.embed_tokens, "embed_scale", 1.0))
        ids = torch.cat([rows.batch(list(range(len(rows))), device), held.batch(list(range(len(held))), device)])
        self.states = nn.functional.embedding(ids, embedding) * scale  # [R + held, T, H], the student's
        self.num_rows = len(rows)
        self.identity = {"schedule": asdict(schedule), "rows": rows.sha256, "held": held.sha256}

    def run(self) -> list[BlockResult]:
        """Train every layer in turn. A killed run goes on with the layer it was at."""
        (self.work / "layers").mkdir(parents=True, exist_ok=True)
        state.claim(self.work / "layers", self.identity)
        bar = tqdm(range(len(self.layers)), desc="distil blockwise", unit="layer", disable=not self.progress)
        for layer_id in bar:
            path = self.work / "layers" / f"{layer_id:05d}.safetensors"
            plain, block, parts, masters = self._build(layer_id)
            if path.exists():
                self._take(parts, masters, load_file(path))
            else:
                result = self._train(layer_id, plain, block, parts, masters)
                self._log(result)  # before the file that says the layer is finished
                state.write_tensors(path, masters)
                bar.set_postfix(error=f"{result.before:.4f} -> {result.after:.4f}")
            with torch.no_grad():
                for i in range(self.states.shape[0]):
                    self.states[i : i + 1] = self._through(block, self.states[i : i + 1])
            self.model.set_submodule(f"model.layers.{layer_id}", nn.Identity())
        return self._results()

    def export(self, out: Path) -> None:
        """The student with what every layer learnt, read back a layer's tensor at a time."""
        folder = self.work / "layers"
        shards = [Shards(folder, path.name) for path in sorted(folder.glob("*.safetensors"))]
        export(self.folder, _Roundings(shards, self.ckpt, self.policy), _Plain(shards), out)

    def _build(self, layer_id: int) -> tuple[nn.Module, nn.Module, list[Layer], dict[str, Tensor]]:
        """(the layer unquantised, the student's, its NVFP4 parts, its masters by tensor name)."""
        prefix = f"model.layers.{layer_id}."
        empty = copy.deepcopy(self.layers[layer_id])
        plain = empty.to_empty(device=self.device)
        for name, parameter in plain.named_parameters():
            with torch.no_grad():
                parameter.copy_(self.shards.read(f"{prefix}{name}"))
        plain.requires_grad_(False).eval()
        block = copy.deepcopy(plain)
        self.model.set_submodule(prefix.removesuffix("."), block)
        weights = nvfp4_weights(self.model, self.ckpt, prefix)
        stored = {n: t for n, t in plain_tensors(self.folder, weights) if n.startswith(prefix)}
        teacher = {f"{prefix}{n}".removesuffix(".weight"): p for n, p in plain.named_parameters()}
        norms = {n.removesuffix(".weight"): t for n, t in stored.items() if t.dim() == 1}
        start = starting_weights(weights, teacher, norms, self.heads)
        parts = swap(self.model, weights, start.weights, self.numerics, self.dtype, self.policy, self.device)
        masters = {f"{name}.weight": part.master for name, part in parts.items()}
        parameters = dict(block.named_parameters())
        for name, tensor in stored.items():
            parameter = parameters.get(name.removeprefix(prefix))
            if parameter is not None:
                masters[name] = tensor.to(device=self.device, dtype=torch.float32).clone()
                gather(parameter, masters[name])
        for part in parts.values():
            gather(part.linear.weight, part.master, part.to_master)
        self._plain = {name: parameters[name.removeprefix(prefix)] for name in masters if name in stored}
        self._stored = {name: stored[name].dtype for name in self._plain}
        self._refresh(list(parts.values()), masters)
        return plain, block, list(parts.values()), masters

    @torch.no_grad()
    def _refresh(self, parts: Sequence[Layer], masters: dict[str, Tensor]) -> None:
        for part in parts:
            part.refresh()
        for name, parameter in self._plain.items():
            parameter.copy_(masters[name].to(self._stored[name]))

    def _take(self, parts: Sequence[Layer], masters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(values[name])
        self._refresh(parts, masters)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        out = block(x, attention_mask=None, position_ids=self.positions, position_embeddings=self.rope)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def _train(
        self, layer_id: int, plain: nn.Module, block: nn.Module, parts: Sequence[Layer], masters: dict[str, Tensor]
    ) -> BlockResult:
        schedule = self.schedule
        optimizer = torch.optim.AdamW(
            list(masters.values()), lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True
        )
        with torch.no_grad():
            wanted = torch.cat([self._through(plain, self.states[i : i + 1]) for i in range(self.states.shape[0])])
            change = (wanted.float() - self.states.float()).square().mean()  # what the layer adds
        before = best = self._held_error(block, wanted, float(change))
        if not math.isfinite(before):
            raise CheckpointError(not_finite(f"block {layer_id}'s held-out error", before))
        kept, best_step = {name: master.clone() for name, master in masters.items()}, 0
        for step in range(schedule.steps):
            chosen = indices(step * schedule.batch_rows, schedule.batch_rows, self.num_rows, schedule.seed)
            for micro in _pieces(chosen, schedule.micro_rows):
                error = (self._through(block, self.states[micro]).float() - wanted[micro].float()).square().mean()
                (error * (len(micro) / len(chosen)) / change).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(list(masters.values()), schedule.clip)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            optimizer.step()
            for master in masters.values():
                assert master.grad is not None
                master.grad.zero_()
            self._refresh(parts, masters)
            if (step + 1) % schedule.eval_every == 0 or step + 1 == schedule.steps:
                error_now = self._held_error(block, wanted, float(change))
                if not math.isfinite(error_now):
                    raise ConfigError(diverged(f"block {layer_id}'s held-out error", error_now, step + 1), "--lr")
                if error_now < best:
                    best, best_step = error_now, step + 1
                    kept = {name: master.detach().clone() for name, master in masters.items()}
        self._take(parts, masters, kept)
        return BlockResult(layer_id, best_step, before, best)

    @torch.no_grad()
    def _held_error(self, block: nn.Module, wanted: Tensor, change: float) -> float:
        """Relative squared error on the held-out rows."""
        total, rows = 0.0, range(self.num_rows, self.states.shape[0])
        for i in rows:
            difference = self._through(block, self.states[i : i + 1]).float() - wanted[i : i + 1].float()
            total += float(difference.square().mean())
        return total / len(rows) / change

    def _results(self) -> list[BlockResult]:
        with (self.work / "blocks.csv").open(newline="", encoding="utf-8") as file:
            rows = {int(row["layer"]): row for row in csv.DictReader(file)}
        return [
            BlockResult(layer, int(row["step"]), float(row["before"]), float(row["after"]))
            for layer, row in sorted(rows.items())
        ]

    def _log(self, result: BlockResult) -> None:
        path = self.work / "blocks.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            writer.writerow([result.layer, result.step, f"{result.before:.8g}", f"{result.after:.8g}"])


def _pieces(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


class _Plain(Mapping[str, Tensor]):
    """Finished layers' tensors by name, read when asked for."""

    def __init__(self, shards: Sequence[Shards]) -> None:
        self._where = {info.name: each for each in shards for info in each}

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _Roundings(Mapping[str, Rounding]):
    """Finished layers' NVFP4 modules: the weights they learnt and the scales to round them under."""

    def __init__(self, shards: Sequence[Shards], ckpt: Checkpoint, policy: BlockScales) -> None:
        self._tensors, self._ckpt, self._policy = _Plain(shards), ckpt, policy
        names = (name.removesuffix(".weight") for name in self._tensors)
        self._modules = [name for name in names if ckpt.has(f"{name}.weight_scale_2")]

    def __getitem__(self, module: str) -> Rounding:
        if module not in self._modules:
            raise KeyError(module)
        weights = self._tensors[f"{module}.weight"]
        stored = self._ckpt.linear(module, *weights.shape)
        assert isinstance(stored, NVFP4Weight)  # it was trained as one
        scale_2 = stored.weight_scale_2[0]
        return weights, stored.block_scale if self._policy == "frozen" else max_block_scales(weights, scale_2), scale_2

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
