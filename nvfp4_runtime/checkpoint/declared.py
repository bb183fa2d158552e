"""Where the configs and the tensors disagree about a layer. The tensors decide; every disagreement is worth a note."""

from __future__ import annotations

from functools import lru_cache

from nvfp4_runtime.checkpoint.detect import FORMAT_OF, MIXED, W4A8, WEIGHT_ONLY, is_excluded
from nvfp4_runtime.checkpoint.patterns import Patterns
from nvfp4_runtime.checkpoint.stored import StoredLayer
from nvfp4_runtime.config import QuantConfig

_NAMES = {"nvfp4": "packed NVFP4", "mxfp4": "packed MXFP4", "fp8": "FP8"}
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED |= {"up_proj": "gate_up_proj"}
_LANGUAGE = "language_model."
_CLASS = "Linear"
_IN = "input_scale"


def excluded(quant: QuantConfig, module: str) -> bool:
    """Whether the declared exclusions cover `module`, by its own name or by one that tools give it.

    Tools see it under another root (a vision model's "language_model.") or fused with its siblings ("qkv_proj").
    """
    return any(is_excluded(alias, quant.exclude) for alias in _aliases(module))


def declared_algos(quant: QuantConfig, module: str) -> frozenset[str]:
    """The algorithms the configs declare for `module`: none for a plain one, several where groups overlap."""
    if quant.algo is None or excluded(quant, module):
        return frozenset()
    if not quant.layers:
        return frozenset() if quant.algo == MIXED else frozenset({quant.algo})
    aliases, by_algo = _aliases(module), _by_algo(quant.layers)
    found = {algo for algo, targets in by_algo.items() if any(targets.match(alias) for alias in aliases)}
    if not found:  # a class name takes what no pattern has taken
        found = {algo for algo, targets in by_algo.items() if targets.match(_CLASS)}
    return frozenset(found)


def disagreements(quant: QuantConfig, layer: StoredLayer) -> list[str]:
    """What is odd about a linear layer, each in words that follow "N layer(s) "."""
    name, stored = layer.prefix, _NAMES.get(layer.format)
    algos = declared_algos(quant, name)
    if layer.problem is not None or (quant.algo == MIXED and not quant.layers and stored is not None):
        return []
    wanted = " or ".join(sorted(algos))
    if stored is None:
        found = [f"are plain although the config declares {wanted} for them"] if algos else []
        return [*found, "are plain and have an input_scale: it is not used"] if _IN in layer.tensors else found
    found = []
    if quant.algo is None:
        found.append(f"are {stored} although no config declares it")
    elif excluded(quant, name):
        found.append(f"are {stored} although the config excludes them")
    elif not algos:
        found.append(f"are {stored} although the config declares nothing for them")
    elif layer.format not in {FORMAT_OF.get(algo) for algo in algos}:
        found.append(f"are {stored} although the config declares {wanted} for them")
    if layer.format == "nvfp4":
        if algos == {WEIGHT_ONLY} and _IN in layer.tensors:
            found.append(f"have an input_scale although {WEIGHT_ONLY} declares none: it is not used")
        if "pre_quant_scale" in layer.tensors and algos and not algos & {"NVFP4_AWQ", W4A8}:
            found.append(f"have a pre_quant_scale although the config declares {wanted}: it is applied")
    return found


@lru_cache(maxsize=4)
def _by_algo(layers: tuple[tuple[str, str], ...]) -> dict[str, Patterns]:
    targets: dict[str, list[str]] = {}
    for target, algo in layers:
        targets.setdefault(algo, []).append(target)
    return {algo: Patterns(names) for algo, names in targets.items()}


def _aliases(module: str) -> tuple[str, ...]:
    """The names under which tools may list `module`."""
    parent, _, leaf = module.rpartition(".")
    names = [module, f"{parent}.{_FUSED[leaf]}"] if leaf in _FUSED else [module]
    if _LANGUAGE in module:
        roots = [name.replace(_LANGUAGE, "", 1) for name in names]
        roots += [f"model.{root}" for root in roots if not root.startswith("model.")]
    else:
        roots = [f"{_LANGUAGE}{name}" for name in names]
        roots += [f"model.{_LANGUAGE}{name.removeprefix('model.')}" for name in names]
    return (*names, *roots)
