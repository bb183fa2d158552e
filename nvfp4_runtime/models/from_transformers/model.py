"""A decoder of transformers on our weights, kernels and cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.cache.specs import CacheSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models.from_transformers import attention
from nvfp4_runtime.models.from_transformers.attention import PagedLayer, PagedStep, Probe, Step, refused
from nvfp4_runtime.models.from_transformers.config import layer_windows, transformers_config
from nvfp4_runtime.models.from_transformers.modules import PackedExperts, PackedLinear, is_experts, tied_head
from nvfp4_runtime.models.from_transformers.names import HubNames
from nvfp4_runtime.models.from_transformers.states import (
    StatefulLayer,
    calls_of,
    keeps_nothing,
    make_cache,
    part_of,
    stateful_layers,
)

_PROBE_TOKENS = 2


class Decoder:
    """Token ids in, float32 logits out, as models/llama.py's Decoder.

    Not batch invariant: what is neither linear layer nor attention runs in PyTorch, whose sums depend on the shape.
    Layers that keep states mix the tokens of a row, so models that have some run sequence by sequence, but for those
    that decode: these are rows of one token each.
    """

    def __init__(
        self,
        config: ModelConfig,
        ckpt: Checkpoint,
        kernels: Kernels,
        kv_dtype: KVDtype,
        max_positions: int | None = None,
        lm_head_dtype: HeadDtype = "auto",
    ) -> None:
        if lm_head_dtype != "auto":
            raise ConfigError(
                f"--lm-head-dtype {lm_head_dtype} needs an implementation of ours, and {config.architecture} runs by "
                "--model-impl transformers; leave it out",
                "--lm-head-dtype",
            )
        if ckpt.adapters:
            raise ConfigError(
                f"--lora-modules needs an implementation of ours, and {config.architecture} runs by --model-impl "
                "transformers; merge the adapter into the model, or leave it out",
                "--lora-modules",
            )
        self.config, self.kv_dtype = config, kv_dtype
        self.max_positions = max_positions or config.max_position_embeddings
        own_config = transformers_config(ckpt.raw_config)
        self.module = _build(config.architecture, own_config, getattr(torch, kernels.dtype))
        names = HubNames(self.module, ckpt.names())
        _place(self.module, ckpt, kernels, names)
        calls, self.stateful = self._probe()
        windows = layer_windows(own_config, config.num_layers)
        self.layers = {i: PagedLayer(kernels, c, kv_dtype, c.window or windows.get(i)) for i, c in calls.items()}
        paths = {id(module): path for path, module in self.module.named_modules()}
        specs: dict[int, CacheSpec] = {i: layer.spec for i, layer in self.stateful.items()}
        for i, layer in self.layers.items():
            specs[i] = layer.spec(ckpt.kv_scales(names(paths[id(calls[i].module)])))
        self.places = {i: place for place, i in enumerate(sorted(specs))}
        self.kv_specs = tuple(specs[i] for i in sorted(specs))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write what the new tokens leave into batch.kv; return logits fp32 [R, vocab] of batch.logits_rows."""
        if not self.stateful:
            logits: Tensor = self._run(self.module, batch, logits_to_keep=batch.logits_rows).logits
            return logits[0].to(torch.float32)
        out = torch.empty(len(batch.logits_rows), self.config.vocab_size)
        for sequences in calls_of(batch):
            part, _, places = part_of(batch, sequences)
            decoding = part.max_query_len == 1
            keep = torch.zeros(1, dtype=torch.int64) if decoding or not places else part.logits_rows
            found: Tensor = self._run_with_states(self.module, part, logits_to_keep=keep).logits
            if places:
                rows = found[part.logits_rows, 0] if decoding else found[0]
                out[places] = rows.to(torch.float32)
        return out

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """The same up to the head: hidden states [R, hidden] of batch.logits_rows, after the final norm."""
        if not self.stateful:
            states: Tensor = self._run(self.module.base_model, batch).last_hidden_state
            return states[0][batch.logits_rows]
        out = torch.empty(len(batch.input_ids), self.config.hidden_size, dtype=self.module.dtype)
        for sequences in calls_of(batch):
            part, rows, _ = part_of(batch, sequences)
            out[rows] = self._run_with_states(self.module.base_model, part).last_hidden_state.flatten(0, 1)
        return out[batch.logits_rows]

    def _run(self, module: Any, batch: ForwardBatch, **options: Any) -> Any:
        step = PagedStep(batch, self.layers, self.places)
        return _call(module, batch.input_ids[None], batch.positions[None], step, **options)

    def _run_with_states(self, module: Any, batch: ForwardBatch, **options: Any) -> Any:
        """One sequence, or several that decode one token each."""
        assert batch.state_slots is not None
        cache, slots = make_cache(self.module.config), batch.state_slots
        states: list[tuple[StatefulLayer, Any, StateLayer]] = []
        for i, layer in self.stateful.items():
            state = batch.kv[self.places[i]]
            assert isinstance(state, StateLayer)
            states.append((layer, cache.layers[i], state))
        if int(batch.positions[0]) > 0:  # else it begins, or all of them go on
            for layer, kept, state in states:
                layer.load(kept, state, slots)
        shape = (-1, 1) if batch.max_query_len == 1 else (1, -1)
        ids, positions = batch.input_ids.view(shape), batch.positions.view(shape)
        step = PagedStep(batch, self.layers, self.places)
        result = _call(module, ids, positions, step, cache=cache, **options)
        for layer, kept, state in states:
            layer.store(kept, state, slots)
        return result

    @torch.inference_mode()
    def _probe(self) -> tuple[dict[int, attention.Call], dict[int, StatefulLayer]]:
        """What each layer's attention asks for, and what others keep. Refuses models whose layers do something else."""
        probe = Probe()
        ids = torch.arange(_PROBE_TOKENS, device=self.module.device)[None]
        kinds = getattr(self.module.config, "layer_types", None) or ()
        cache = make_cache(self.module.config) if "linear_attention" in kinds else None
        try:
            _call(self.module, ids, ids, probe, **({} if cache is None else {"cache": cache}))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise refused(f"{type(error).__name__} in its forward pass: {error}") from error
        stateful = {} if cache is None else stateful_layers(cache)
        known = {*probe.calls, *stateful}
        missing = [i for i in range(self.config.num_layers) if i not in known]
        if cache is not None:
            missing = [i for i in missing if not keeps_nothing(cache, i)]
        if missing:
            raise refused(f"layer {missing[0]} and {len(missing) - 1} more have no attention that goes by the registry")
        if stateful and self.module.device.type != "cpu":
            raise refused("its layers keep states, and those run on CPUs only")
        return probe.calls, stateful


def _call(module: Any, ids: Tensor, positions: Tensor, step: Step, **options: Any) -> Any:
    """ids and positions [B, T]."""
    return module(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        **{attention.ARGUMENT: step},
        **options,
    )


def _build(architecture: str, config: Any, dtype: torch.dtype) -> Any:
    """The module of transformers' own that `architecture` names, without weights."""
    import transformers
    from transformers.initialization import no_init_weights

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise refused(f"{architecture[:80]!r} is no class of transformers {transformers.__version__}")
    cls: Any = found
    # classes with states say no, as they mix a row's tokens; whether their attention goes by the registry is probed
    if not cls.is_backend_compatible() and not getattr(cls, "_is_stateful", False):
        raise refused(f"{architecture} does not take attention functions from outside")
    attention.register()
    try:
        with parameters_on_meta(), no_init_weights():
            module = cls._from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
    except Exception as error:
        raise refused(f"transformers cannot build {architecture}: {type(error).__name__}: {error}") from error
    if module.get_output_embeddings() is None:
        raise refused(f"{architecture} has no head that gives logits")
    return module


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory; buffers are real, as no file replaces them."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _place(module: Any, ckpt: Checkpoint, kernels: Kernels, names: HubNames) -> None:
    """Fill the module: linear layers and experts become ours, other parameters and stored buffers are read."""
    dtype: torch.dtype = getattr(torch, kernels.dtype)
    head = module.get_output_embeddings()
    for path, child in list(module.named_modules()):
        if child is head and module.config.tie_word_embeddings and not ckpt.has(names(f"{path}.weight")):
            continue
        if type(child) is nn.Linear:
            _replace(module, path, PackedLinear.load(ckpt, kernels, names(path), child, dtype))
        elif is_experts(child):
            _replace(module, path, PackedExperts.load(ckpt, kernels, names(path), child, dtype))
    embedding = module.get_input_embeddings()
    for path, child in module.named_modules():
        if child is head:
            continue
        for name, tensor in [*child.named_parameters(recurse=False), *_stored_buffers(child)]:
            full = f"{path}.{name}" if path else name
            stored = ckpt.tensor(names(full), tuple(tensor.shape))
            _set(child, name, kernels.place(stored.to(tensor.dtype)))
    if head is module.get_output_embeddings():  # tied
        path = next(path for path, child in module.named_modules() if child is head)
        _replace(module, path, tied_head(kernels, embedding.weight.data, dtype))
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = kernels.place(buffer)


def _stored_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    unstored = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in unstored]


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
