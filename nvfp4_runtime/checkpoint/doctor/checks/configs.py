"""What the JSON files declare, held against each other and against the tensors. The tensors are right."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from nvfp4_runtime.checkpoint.checkpoint import check_metadata
from nvfp4_runtime.checkpoint.detect import CONFIG, FORMAT_OF, HF_QUANT, MIXED, check_readable
from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.measure import Measured, is_plain
from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.checkpoint.patterns import compiled
from nvfp4_runtime.errors import UnsupportedFormatError

_REWRITE = "--repair writes configs that say what the tensors are"


def config_missing(case: Case) -> Iterable[Finding]:
    if not case.config:
        yield Finding(
            "config-missing",
            "error",
            f"the folder has no {CONFIG}",
            f"fetch {CONFIG} of the model: without it nobody knows the architecture",
            (CONFIG,),
        )


def config_disagreement(case: Case) -> Iterable[Finding]:
    for note in case.quant.notes:
        yield Finding(
            "config-disagreement",
            "warning",
            note,
            f"make {CONFIG} and {HF_QUANT} say the same: tools differ in which they read; {_REWRITE}",
            (CONFIG, HF_QUANT),
        )


def unsupported(case: Case) -> Iterable[Finding]:
    """A format without a reader here, as the configs or the files' own remarks name it."""
    for check in (partial(check_readable, case.quant, case.folder), partial(check_metadata, case.shards)):
        try:
            check()
        except UnsupportedFormatError as error:
            yield Finding(
                "format-unsupported",
                "error",
                f"cannot be served here: {error}",
                "serve it with another engine, or quantise the BF16 model with `nvfp4 quantize`",
                (CONFIG,),
            )


def undeclared(case: Case) -> Iterable[Finding]:
    if case.quant.algo == MIXED and not case.quant.layers:
        return  # a finding of its own: nothing says which layers are which
    yield from about(
        "quantised-undeclared",
        "warning",
        [
            layer
            for layer in case.layers
            if layer.stored.block is not None and not case.algos(layer.name) and case.excluded_by(layer.name) is None
        ],
        "are quantised although no config declares it",
        f"other engines will fail on them; {_REWRITE}",
    )


def patterns_unevaluated(case: Case) -> Iterable[Finding]:
    """Expressions that could run for ever are not run."""
    yield from about(
        "pattern-unevaluated",
        "info",
        compiled(case.quant.exclude).unevaluated,
        "are exclusion patterns too involved to evaluate safely; they count as covering nothing",
        "none needed here: the tensors decide",
    )


def excluded_but_quantised(case: Case) -> Iterable[Finding]:
    if case.quant.algo is None:
        return
    yield from about(
        "excluded-but-quantised",
        "warning",
        [m for m in case.layers if m.stored.block is not None and case.excluded_by(m.name) is not None],
        "are quantised although the config excludes them",
        f"this server goes by the tensors, others may read them as plain; {_REWRITE}",
    )


def declared_otherwise(case: Case) -> Iterable[Finding]:
    """Quantised, but as something else."""
    other: dict[str, list[str]] = {}
    for layer in case.layers:
        algos = case.algos(layer.name)
        if layer.stored.block is not None and algos and layer.stored.format not in {FORMAT_OF.get(a) for a in algos}:
            other.setdefault(f"{layer.stored.format} although {' or '.join(sorted(algos))}", []).append(layer.name)
    for what, names in other.items():
        yield from about(
            "declared-otherwise",
            "warning",
            names,
            f"are stored as {what} is declared for them",
            "this server goes by the tensors, others fail on them; correct the config",
        )


def declared_but_plain(case: Case) -> Iterable[Finding]:
    yield from about(
        "declared-but-plain",
        "warning",
        [layer for layer in case.layers if is_plain_linear(layer) and case.algos(layer.name)],
        "are plain although the config declares them quantised",
        f"this server goes by the tensors, others fail on them; {_REWRITE}",
    )


def is_plain_linear(layer: Measured) -> bool:
    """A plain matrix that by its name is a linear layer; routers, norms and embeddings are named otherwise."""
    leaf = layer.name.rpartition(".")[2]
    return is_plain(layer.stored) and layer.stored.k > 1 and (leaf.endswith("_proj") or leaf in ("w1", "w2", "w3"))
