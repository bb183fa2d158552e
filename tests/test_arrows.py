"""The architecture, kept true by reading the imports: inside functions and under TYPE_CHECKING they count as well.

    errors config batch process <- nvfp4 parallel <- checkpoint kernels cache <- layers <- models <- structured
        <- sampling <- engine <- server

A module imports from its own package and from those to its left; names of one group do not import each other.
`loadtest` speaks HTTP and imports none of it, but for loadtest/plan: a planner that simulates the scheduler has to
simulate ours.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = "nvfp4_runtime"
PRODUCT = (RUNTIME, "server", "loadtest")

CHAIN = (
    ("errors", "config", "batch", "process"),
    ("nvfp4", "parallel"),
    ("checkpoint", "kernels", "cache"),
    ("layers",),
    ("models",),
    ("structured",),
    ("sampling",),
    ("engine",),
)
# What each part of the runtime may import beside itself.
MAY_IMPORT = {part: {p for group in CHAIN[:i] for p in group} for i, group in enumerate(CHAIN) for part in group}
MAY_IMPORT["text"] = {"errors"}
MAY_IMPORT["structured"] = {"errors", "process"}
MAY_IMPORT["quantize"] = {p for group in CHAIN[:5] for p in group}
MAY_IMPORT["evaluate"] = {p for group in CHAIN for p in group} | {"text", "quantize"}
MAY_IMPORT["distill"] = {p for group in CHAIN for p in group} | {"text", "quantize", "evaluate", "llm"}
MAY_IMPORT["llm"] = {p for group in CHAIN for p in group} | {"text"}  # the offline door: engine and text in one process
MAY_IMPORT[""] = {"llm", "sampling"}  # nvfp4_runtime/__init__.py: lazily, the names it offers

# The server knows no tensors. cli.py and commands/ reach the rest, for the sub-commands that compute; model_source.py
# asks where the default model is cached, of a module that TORCH_FREE holds to its lightness.
SERVER_MAY_IMPORT = (
    "errors", "config", "text", "structured.spec", "structured.thinking", "sampling.params", "engine.messages",
    "engine.client", "engine.token_stream",
)  # fmt: skip
# These launch an engine; nobody else does.
STARTER_MAY_IMPORT = (*SERVER_MAY_IMPORT, "engine.supervisor", "engine.replicas")
STARTERS = ("server.serve", "server.embedded")
# The scheduler and what it stands on, for simulating it: all without torch.
PLAN_MAY_IMPORT = (
    "config", "cache.block_pool", "sampling.params", "engine.messages", "engine.request", "engine.scheduler",
    "engine.cost",
)  # fmt: skip
TORCH_FREE = (
    RUNTIME,
    f"{RUNTIME}.errors",
    f"{RUNTIME}.config",
    f"{RUNTIME}.parallel",
    f"{RUNTIME}.cache.block_pool",
    f"{RUNTIME}.cache.specs",
    f"{RUNTIME}.structured.spec",
    f"{RUNTIME}.structured.thinking",
    f"{RUNTIME}.structured.compiler",
    f"{RUNTIME}.sampling.params",
    f"{RUNTIME}.sampling.state",
    f"{RUNTIME}.engine.messages",
    f"{RUNTIME}.engine.request",
    f"{RUNTIME}.engine.scheduler",
    f"{RUNTIME}.engine.client",
    f"{RUNTIME}.engine.supervisor",
    f"{RUNTIME}.engine.replicas",
    f"{RUNTIME}.engine.logs",
    f"{RUNTIME}.text",
    f"{RUNTIME}.quantize.default_model",
    "server.app",
    "server.serve",
    "server.cli",
    "loadtest",
    "loadtest.plan.command",
)
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
FORBIDDEN_TRUE = {"allow_pickle", "trust_remote_code", "shell"}


_TRAINS = f"{RUNTIME}.distill.hf"  # teachers, and the modules that students are built in


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every (module, line) imported anywhere in `tree`; `from a import b` gives a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield (f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield computed_import(node.args[0], module), node.lineno


def computed_import(name: ast.expr, module: str) -> str:
    """What `import_module(name)` may import: a constant, or f"{__name__}.x", which stays in its own package."""
    if isinstance(name, ast.Constant):
        return str(name.value)
    assert ast.unparse(name).startswith("f'{__name__}."), f"{module}:{name.lineno}: import of a computed name"
    return module


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return list(imports(tree, module_name(path), path.name == "__init__.py"))


def part_of(module: str) -> str:
    """nvfp4_runtime.kernels.ops -> kernels; nvfp4_runtime itself -> ''."""
    return module.split(".")[1] if "." in module else ""


def runtime_violations(module: str, imported: str) -> str | None:
    """Why nvfp4_runtime module `module` may not import `imported`, or None."""
    top = imported.split(".")[0]
    if top in PRODUCT and top != RUNTIME:
        return f"the runtime does not know {top}"
    if top == "transformers" and not module.startswith(f"{RUNTIME}.models.from_transformers.") and module != _TRAINS:
        return f"transformers is for models/from_transformers, {_TRAINS}, tests and benchmarks"
    if top != RUNTIME:
        return None
    part, target = part_of(module), part_of(imported)
    if part not in MAY_IMPORT:
        return f"{part} has no place in the chain yet: draw it here and in the docs"
    if part == target or target == "":
        return None
    return None if target in MAY_IMPORT[part] else f"{part or '__init__'} may import only {sorted(MAY_IMPORT[part])}"


def kernels_violations(module: str, imported: str) -> str | None:
    """Only the registry knows the backends; a backend knows itself, and Blackwell's is built on Triton's."""
    prefix = f"{RUNTIME}.kernels."
    backends = {p.name for p in (ROOT / RUNTIME / "kernels").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    if not (module.startswith(prefix) and imported.startswith(prefix)) or module == f"{prefix}registry":
        return None
    target, own = imported.split(".")[2], module.split(".")[2]
    known = {own} | ({"triton"} if own == "blackwell" else set())
    return f"only kernels/registry.py imports backend {target}" if target in backends - known else None


def server_violations(module: str, imported: str) -> str | None:
    top, _, rest = imported.partition(".")
    computes = module == "server.cli" or module.startswith("server.commands.")
    if top == "loadtest" or top in ("torch", "transformers"):
        return f"the server does not know {top}" if not computes or top != "torch" else None
    if top != RUNTIME or rest == "" or computes:
        return None
    names = STARTER_MAY_IMPORT if module in STARTERS else SERVER_MAY_IMPORT
    if module == "server.model_source":
        names = (*names, "quantize.default_model")
    allowed = any(rest == name or rest.startswith(f"{name}.") for name in names)
    return None if allowed else f"only cli.py and commands/ reach beyond {names}"


def loadtest_violations(module: str, imported: str) -> str | None:
    top, _, rest = imported.partition(".")
    if top not in (RUNTIME, "server"):
        return None
    plans = module.startswith("loadtest.plan.") and top == RUNTIME
    return None if plans and rest in PLAN_MAY_IMPORT else f"loadtest speaks HTTP; loadtest/plan has {PLAN_MAY_IMPORT}"


RULES = {
    RUNTIME: (runtime_violations, kernels_violations),
    "server": (server_violations,),
    "loadtest": (loadtest_violations,),
}


@pytest.mark.parametrize("package", PRODUCT)
def test_imports_follow_the_arrows(package):
    found = []
    for path in sources(package):
        for imported, line in imports_of(path):
            for rule in RULES[package]:
                if (why := rule(module_name(path), imported)) is not None:
                    found.append(f"{path.relative_to(ROOT)}:{line}: imports {imported}: {why}")
    assert not found, "\n".join(found)


def test_every_part_of_the_runtime_has_its_place():
    parts = {part_of(module_name(path)) for path in sources(RUNTIME)}
    assert parts <= set(MAY_IMPORT), f"no place in the chain for {sorted(parts - set(MAY_IMPORT))}"
    assert set(MAY_IMPORT) <= parts, f"the chain names what is gone: {sorted(set(MAY_IMPORT) - parts)}"


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("nvfp4_runtime.layers.linear", "nvfp4_runtime.kernels.ops", True),
        ("nvfp4_runtime.kernels.ops", "nvfp4_runtime.layers.linear", False),
        ("nvfp4_runtime.kernels.ops", "nvfp4_runtime.checkpoint.shards", False),
        ("nvfp4_runtime.config", "nvfp4_runtime.errors", False),
        ("nvfp4_runtime.text.tokenizer", "nvfp4_runtime.config", False),
        ("nvfp4_runtime.quantize.ptq", "nvfp4_runtime.engine.engine", False),
        ("nvfp4_runtime.evaluate.scorer", "nvfp4_runtime.engine.build", True),
        ("nvfp4_runtime.engine.engine", "nvfp4_runtime.evaluate.scorer", False),
        ("nvfp4_runtime.distill.synthesize", "nvfp4_runtime.llm", True),
        ("nvfp4_runtime.distill.hf", "transformers", True),
        ("nvfp4_runtime.distill.trainer", "transformers", False),
        ("nvfp4_runtime.quantize.ptq", "nvfp4_runtime.distill.run", False),
        ("nvfp4_runtime.engine.core", "server.app", False),
        ("nvfp4_runtime.sampling.params", "nvfp4_runtime.structured.spec", True),
        ("nvfp4_runtime.structured.compiler", "nvfp4_runtime.text.tokenizer", False),
        ("server.routes.chat", "nvfp4_runtime.structured.spec", True),
        ("server.routes.chat", "nvfp4_runtime.structured.compiler", False),
        ("nvfp4_runtime.llm", "nvfp4_runtime.text.tokenizer", True),
        ("nvfp4_runtime.models.llama", "transformers.models", False),
        ("nvfp4_runtime.kernels.registry", "nvfp4_runtime.kernels.cpu.backend", True),
        ("nvfp4_runtime.kernels.cpu.backend", "nvfp4_runtime.kernels.reference.linear", False),
        ("nvfp4_runtime.kernels.blackwell.backend", "nvfp4_runtime.kernels.triton.common", True),
        ("nvfp4_runtime.kernels.triton.backend", "nvfp4_runtime.kernels.cpu.backend", False),
        ("server.routes.chat", "nvfp4_runtime.engine.client", True),
        ("server.routes.chat", "nvfp4_runtime.engine.engine", False),
        ("server.routes.chat", "nvfp4_runtime.sampling.params", True),
        ("server.routes.chat", "nvfp4_runtime.sampling.sampler", False),
        ("server.app", "torch", False),
        ("server.cli", "nvfp4_runtime.quantize", True),
        ("server.commands.quantize", "nvfp4_runtime.quantize.pipeline", True),
        ("server.model_source", "nvfp4_runtime.quantize.default_model", True),
        ("server.model_source", "nvfp4_runtime.quantize.pipeline", False),
        ("server.app", "nvfp4_runtime.quantize.default_model", False),
        ("loadtest.bench_engine", "nvfp4_runtime", False),
        ("loadtest.plan.simulate", "nvfp4_runtime.engine.scheduler", True),
        ("loadtest.plan.simulate", "nvfp4_runtime.engine.engine", False),
        ("loadtest.compare.measure", "nvfp4_runtime.engine.scheduler", False),
        ("loadtest.plan.simulate", "server.app", False),
    ],
)
def test_the_rules_tell_right_from_wrong(module, imported, allowed):
    reasons = [why for rule in RULES[module.split(".")[0]] if (why := rule(module, imported)) is not None]
    assert (not reasons) is allowed, reasons


def test_imports_are_seen_wherever_they_stand():
    code = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import a.b\n"
        "def f():\n    from . import errors\n    from .text import nothing\n"
        "    from nvfp4_runtime import config, __version__\n"
        "    importlib.import_module('pickle')\n"
        "    importlib.import_module(f'{__name__}.{x}')\n"
    )
    found = {name for name, _ in imports(ast.parse(code), f"{RUNTIME}.llm", False)}
    ours = {f"{RUNTIME}.{name}" for name in ("errors", "text", "config", "llm")}
    assert found == {"typing", "a.b", RUNTIME, "pickle"} | ours


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_brings_neither_torch_nor_transformers(module):
    code = (
        f"import sys, {module}\n"
        "lazy = {'torch', 'transformers', 'gguf', 'safetensors', 'llguidance', 'opentelemetry.sdk', 'textual'}\n"
        "heavy = sorted(lazy & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def dangers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(what, line) of everything that runs, or may run, what a file or a stranger says."""
    for name, line in imports(tree, "product.module", False):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield f"import {name}", line
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"{called}()", node.lineno
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_TRUE and ast.unparse(keyword.value) != "False":
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}", node.lineno


@pytest.mark.parametrize("package", PRODUCT)
def test_no_product_code_runs_what_a_file_says(package):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sources(package)
        for what, line in dangers(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "dangerous"),
    [
        ("import pickle", True),
        ("def f():\n    from multiprocessing import Pipe", True),
        ("eval(text)", True),
        ("model.eval()", False),
        ("torch.load(path, weights_only=True)", True),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("subprocess.run(command, shell=True)", True),
        ("re.compile(text)", False),
    ],
)
def test_the_search_for_dangers_tells_right_from_wrong(code, dangerous):
    assert bool(list(dangers(ast.parse(code)))) is dangerous


def test_the_packages_looked_at_are_the_ones_installed():
    assert all(importlib.util.find_spec(package) is not None for package in PRODUCT)
    assert all(sources(package) for package in PRODUCT)
