"""The files against what the model will ask them for: missing, of another shape, never read.

For an architecture that is served here, what its model reads is known. Of any other, only its layers can be held
against each other: what more than half of them have, one that is otherwise like them should have too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from nvfp4_runtime.checkpoint.doctor.case import Case, about, expert_group
from nvfp4_runtime.checkpoint.doctor.expected import Expected, Module
from nvfp4_runtime.checkpoint.doctor.measure import Measured, is_plain
from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.checkpoint.shards import PLAIN

_NUMBERED = re.compile(r"(.*?\b(?:layers|blocks|h))\.(\d{1,9})\.(.+)")
_SCALES = (".weight_scale", ".weight_scale_2", ".weight_global_scale", ".weight_scale_inv")
_FETCH = "fetch or export the checkpoint again; --repair cannot make up what is lost"


def config_refused(case: Case) -> Iterable[Finding]:
    """A served architecture whose config.json asks for arithmetic that its model here does not do."""
    if case.refusal is not None:
        yield Finding(
            "format-unsupported",
            "error",
            f"cannot be served here: {case.refusal}",
            "serve it with another engine, or correct config.json",
            ("config.json",),
        )


def missing(case: Case) -> Iterable[Finding]:
    """Modules without their weight, and layers without their bias."""
    lost = lost_weights(case)
    yield from about(
        "tensor-missing", "error", lost, "have scales, and the weight that they scale is not in the files", _FETCH
    )
    if case.expected is None:
        yield from about(
            "tensor-missing",
            "error",
            [name for name in _unlike_siblings(case) if name not in lost],
            "are not in the files, and more than half of the layers, otherwise like theirs, have one (the architecture "
            "is not served here, so that layers can only be held against each other)",
            _FETCH,
        )
        return
    reported = {*lost, *_reported_elsewhere(case, case.expected)}
    yield from about(
        "tensor-missing",
        "error",
        [*_absent(case, case.expected, reported), *_without_bias(case, case.expected)],
        f"are not in the files, and {case.expected.architecture} reads them: the server refuses the checkpoint",
        _FETCH,
    )


def lost_weights(case: Case) -> list[str]:
    """Modules of which only scales are left."""
    names = [item.info.name for item in case.loose if item.kind == "orphan"]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(_SCALES))
    if case.expected is None:
        return list(modules)
    return [module for module in modules if module in case.expected.modules]


def _absent(case: Case, expected: Expected, reported: set[str]) -> Iterator[str]:
    for name, module in expected.modules.items():
        if name not in case.by_name and not module.optional and name not in reported:
            yield name
    for name in expected.loose:
        if name not in case.shards:
            yield name


def _without_bias(case: Case, expected: Expected) -> Iterator[str]:
    for name, module in expected.modules.items():
        layer = case.by_name.get(name)
        if module.bias and layer is not None and "bias" not in layer.stored.tensors:
            yield f"{name}.bias"


def _reported_elsewhere(case: Case, expected: Expected) -> set[str]:
    """What `layer-missing` and `head-missing` say already."""
    present = {match[2] for info in case.shards if (match := _NUMBERED.fullmatch(info.name)) is not None}
    numbered = {name: match[2] for name in expected.modules if (match := _NUMBERED.fullmatch(name)) is not None}
    names = {name for name, number in numbered.items() if number not in present} if present else set()
    if case.config.get("tie_word_embeddings") is False and "model.embed_tokens" in case.by_name:
        names.add("lm_head")
    return names


def _unlike_siblings(case: Case) -> list[str]:
    """Modules that a layer lacks and that the layers it is otherwise a part of have, where those are most of them.

    Layers of different kinds (attention and state space, dense and experts) are no parts of each other.
    """
    stacks: dict[str, dict[str, set[str]]] = {}
    for layer in case.layers:
        if expert_group(layer.name) is None and (match := _NUMBERED.fullmatch(layer.name)) is not None:
            stacks.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    found = []
    for container, layers in stacks.items():
        whole, count = Counter(frozenset(names) for names in layers.values()).most_common(1)[0]
        if 2 * count <= len(layers):
            continue
        for number, names in layers.items():
            if names < whole:
                found += [f"{container}.{number}.{name}" for name in sorted(whole - names)]
    return found


def shapes(case: Case) -> Iterable[Finding]:
    """Weights of another size or kind than config.json implies, by what was found and expected."""
    if case.expected is None:
        return
    wrong: dict[str, list[str]] = {}
    for name, module in case.expected.modules.items():
        layer = case.by_name.get(name)
        if layer is not None and layer.stored.problem is None and (what := _mismatch(case, layer, module)) is not None:
            wrong.setdefault(what, []).append(name)
    for name, shape in case.expected.loose.items():
        info = case.shards.info(name)
        if info is not None and (info.dtype not in PLAIN or info.shape != shape):
            wrong.setdefault(f"are {info}, and config.json implies plain {list(shape)}", []).append(name)
    for what, names in wrong.items():
        yield from about(
            "shape-mismatch",
            "error",
            names,
            f"{what}: the server refuses the checkpoint",
            "fetch the config.json and the files that belong together",
        )


def _mismatch(case: Case, layer: Measured, module: Module) -> str | None:
    stored, wanted = layer.stored, list(module.shape)
    info = case.shards.require(stored.tensors["weight"])
    if module.experts:
        found, wanted = [stored.experts, stored.n, stored.k], [module.experts, *wanted]
        return None if found == wanted else f"are stacks of the shape {found}, and config.json implies {wanted}"
    if not module.linear or is_plain(stored):
        if info.dtype not in PLAIN:
            return f"are stored as {info}, and config.json implies plain {wanted}"
        return None if info.shape == module.shape else f"have the shape {list(info.shape)}, expected {wanted}"
    if stored.experts or (stored.n, stored.k) != module.shape:
        return f"are {stored.format} of the shape {[stored.n, stored.k]}, and config.json implies {wanted}"
    return None


def unexpected(case: Case) -> Iterable[Finding]:
    """Tensors that the model never reads: the loader takes them for a sign of a wrong config.json."""
    if case.expected is None:
        return
    expected, lost = case.expected, set(lost_weights(case))
    wanted = case.model_config.get("num_hidden_layers")
    names: list[str] = []
    for layer in case.layers:
        match = _NUMBERED.fullmatch(layer.name)
        if match is not None and match[1] == "model.layers" and type(wanted) is int and int(match[2]) >= wanted:
            continue  # layer-unexpected
        module = expected.modules.get(layer.name)
        if module is None:
            names += [name for name in layer.stored.tensors.values() if not expected.excuses(name)]
        elif not module.bias and "bias" in layer.stored.tensors:
            names.append(layer.stored.tensors["bias"])
    for item in case.loose:
        of_lost = item.info.name.rpartition(".")[0] in lost
        read = item.kind == "kv_scale" or item.info.name in expected.loose
        if not read and not of_lost and not expected.excuses(item.info.name):
            names.append(item.info.name)
    yield from about(
        "tensor-unexpected",
        "error",
        names,
        f"are tensors that {expected.architecture} does not read: the server refuses the checkpoint",
        "check architectures in config.json, or remove them; --repair drops scales that scale nothing",
    )
