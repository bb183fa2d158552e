"""Which tensors are there: layers that cannot be read, layers missing, tensors that belong to nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from nvfp4_runtime.checkpoint.doctor.case import Case, about, expert_group
from nvfp4_runtime.checkpoint.doctor.checks.complete import lost_weights
from nvfp4_runtime.checkpoint.doctor.checks.layout import padded_scale
from nvfp4_runtime.checkpoint.doctor.decode import read_any, same_bytes
from nvfp4_runtime.checkpoint.doctor.files import some
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.checkpoint.shards import PLAIN
from nvfp4_runtime.errors import MissingTensorError

_LAYER = re.compile(r"(?:model|backbone|transformer)\.(?:language_model\.)?layers\.(\d{1,9})\.")


def unreadable(case: Case) -> Iterable[Finding]:
    """Every layer the loader would refuse, with the loader's words."""
    by_reason: dict[str, list[str]] = {}
    for layer in case.layers:
        problem = layer.stored.problem
        if problem is None or padded_scale(case.shards, layer.stored) is not None:
            continue
        if isinstance(problem, MissingTensorError) and expert_group(layer.name) is not None:
            continue
        kind = re.sub(r"\d+", "N", str(problem).replace(layer.name, "LAYER"))
        by_reason.setdefault(kind, []).append(layer.name)
    for names in by_reason.values():
        problem = case.by_name[names[0]].stored.problem
        yield from about(
            "layer-unreadable",
            "error",
            names,
            f"cannot be read ({problem})",
            "fetch or export the checkpoint again; --repair quantises them again with --parent",
        )


def extra_values(case: Case) -> Iterable[Finding]:
    """Scales and biases that the loader refuses for their size or type, beside a weight that is as it should be."""
    by_reason: dict[str, list[str]] = {}
    for layer in case.layers:
        if layer.stored.problem is None and not layer.stored.experts:
            for what in _refused(case, layer):
                by_reason.setdefault(what, []).append(layer.name)
    for what, names in by_reason.items():
        yield from about(
            "layer-unreadable",
            "error",
            names,
            f"cannot be read: {what}",
            "fetch or export the checkpoint again; --repair quantises them again with --parent",
        )


def _refused(case: Case, layer: Measured) -> Iterator[str]:
    """What `parts.read_one` raises for the tensors of one matrix."""
    stored = layer.stored
    for role in ("tensor_scale", "input_scale", "pre_quant_scale", "bias", "scale"):
        info = case.shards.info(stored.tensors.get(role, ""))
        if info is None:
            continue
        leaf = info.name.rpartition(".")[2]
        if info.dtype not in PLAIN:
            yield f"{leaf} is {info}, expected {' or '.join(PLAIN)}"
        elif role in ("tensor_scale", "input_scale") and math.prod(info.shape) != 1:
            yield f"{leaf} is {info}, expected one value, [] or [1]"
        elif role == "pre_quant_scale" and info.shape != (stored.k,):
            yield f"{leaf} is {info}, expected {[stored.k]}"
        elif role == "bias" and info.shape != (stored.n,):
            yield f"{leaf} is {info}, expected {[stored.n]}"


def orphans(case: Case) -> Iterable[Finding]:
    lost = set(lost_weights(case))  # a finding of their own
    names = [
        item.info.name for item in case.loose if item.kind == "orphan" and item.info.name.rpartition(".")[0] not in lost
    ]
    yield from about(
        "orphan-tensor",
        "warning",
        [name for name in names if not name.endswith("_double_scale")],
        "are scales or biases of a weight that is not there",
        "check that the layer they belong to was not lost; --repair drops scales that scale nothing",
    )


def loose_parameters(case: Case) -> Iterable[Finding]:
    """Tensors of no known spelling: some models have such, of others nobody reads them."""
    read = case.expected.loose if case.expected is not None else {}
    names = [item.info.name for item in case.loose if item.kind == "parameter" and item.info.name not in read]
    if names:
        yield Finding(
            "tensor-loose",
            "info",
            f"{len(names)} tensor(s) are neither weight, bias nor scale of a module: {some(names)}",
            "none if the architecture has such parameters; the server refuses tensors that its model does not read",
            tuple(names),
        )


def decoder_layers(case: Case) -> Iterable[Finding]:
    """Layers that config.json counts and the files lack, or hold beyond its count."""
    wanted = case.model_config.get("num_hidden_layers")
    present = {int(m[1]) for info in case.shards if (m := _LAYER.match(info.name)) is not None}
    if type(wanted) is not int or not present or wanted > 100_000:
        return
    yield from about(
        "layer-missing",
        "error",
        [f"layers.{i}" for i in range(wanted) if i not in present],
        f"of the {wanted} that config.json counts are not in the files",
        "fetch the missing shards, or check num_hidden_layers in config.json",
    )
    predictors = case.model_config.get("num_nextn_predict_layers")  # multi-token prediction, after the last layer
    allowed = wanted + (predictors if type(predictors) is int else 0)
    yield from about(
        "layer-unexpected",
        "warning" if case.expected is None else "error",
        [f"layers.{i}" for i in sorted(present) if i >= allowed],
        f"lie beyond the {wanted} that config.json counts: nothing reads them"
        + ("" if case.expected is None else ", and the server refuses the checkpoint"),
        "check num_hidden_layers in config.json",
    )


def tied_head(case: Case) -> Iterable[Finding]:
    """A head that is tied to the embedding and stored all the same, or untied and missing."""
    tied = case.config.get("tie_word_embeddings")
    embedding = next((info for info in case.shards if info.name.endswith("embed_tokens.weight")), None)
    head = next((layer for layer in case.layers if layer.name.rpartition(".")[2] == "lm_head"), None)
    if embedding is None:
        return
    if head is None and tied is False:
        yield Finding(
            "head-missing",
            "error",
            f"there is no lm_head, and config.json says it is not tied to {embedding.name}",
            "fetch the missing tensor, or set tie_word_embeddings",
            ("lm_head",),
        )
    if head is not None and tied is True:
        weight = case.shards.info(head.stored.tensors.get("weight", ""))
        same = weight is not None and same_bytes(
            read_any(case.shards, weight.name), read_any(case.shards, embedding.name)
        )
        yield Finding(
            "head-tied-and-stored",
            "info" if same else "warning",
            f"{head.name} is stored as {head.stored.format} although tie_word_embeddings is true"
            + (
                "; it repeats the embedding"
                if same
                else "; it is not the embedding, and loaders differ in which they use"
            ),
            "none needed" if same else "set tie_word_embeddings to false if the stored head is the one meant",
            (head.name,),
        )
