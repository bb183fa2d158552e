"""Kernels compiled ahead of time, for GPUs this machine does not have: what CI can know of them without one.

    python -m tests.kernels.triton.ahead MODULE [MODULE ...]

compiles what each module's `compilations()` lists, for every target it names, and prints one JSON object per result:
registers, stack bytes (spills), shared memory, which of the expected instructions are missing. Run it in a process
without TRITON_INTERPRET: a kernel decorated under the interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nvfp4_runtime.kernels.compilation import TARGETS, Compilation

# Bytes of shared memory one block may use.
SHARED_LIMITS = {
    80: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}


@dataclass
class Result:
    """What one compilation gave on one target; `problems` is empty where it is as expected.

    sass  instruction -> how often it stands in the machine code, without modifiers
    """

    module: str
    name: str
    target: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    sass: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compile_for(module: str, what: Compilation, target: int, keep: Path | None = None) -> Result:
    """Compile and inspect. A failure of the compiler is a problem in the result, with its message.

    keep  a folder for the PTX and SASS text
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = Result(module, what.name, target)
    names = list(what.kernel.arg_names)
    signature = {name: what.signature.get(name, "constexpr") for name in names}
    if unknown := (set(what.signature) | set(what.constexprs)) ^ set(names):
        raise ValueError(f"{module} {what.name}: the kernel's arguments and the declared ones differ in {unknown}")
    aligned = [n for n in what.signature if n not in what.unaligned and what.signature[n] != "fp32"]
    source = ASTSource(
        fn=what.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in what.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": what.num_warps, "num_stages": what.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as e:  # noqa: BLE001 - whatever the compiler throws is the finding
        result.problems.append(f"does not compile: {type(e).__name__}: {str(e)[-2000:]}")
        return result
    result.shared = compiled.metadata.shared
    if result.shared > SHARED_LIMITS[target]:
        result.problems.append(f"{result.shared} bytes of shared memory, the limit is {SHARED_LIMITS[target]}")
    ptx, sass = compiled.asm["ptx"], _inspect(compiled.asm["cubin"], result)
    if result.stack > what.max_stack:
        result.problems.append(f"spills: {result.stack} bytes of stack, allowed are {what.max_stack}")
    text = ptx + sass
    missing = [i for i in (*what.expect, *what.expect_on.get(target, ())) if i not in text]
    result.problems += [f"no {instruction} in its code" for instruction in missing]
    result.problems += [f"{instruction} in its code" for instruction in what.forbid if instruction in text]
    if keep is not None:
        stem = keep / f"{module.rpartition('.')[2]}-{what.name}-{target}"
        stem.with_suffix(".ptx").write_text(ptx)
        stem.with_suffix(".sass").write_text(sass)
    return result


def _inspect(cubin: bytes, result: Result) -> str:
    """Fill in registers, stack and instruction counts; the SASS text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        result.problems.append(f"cuobjdump tells no resource usage: {usage[-300:]}")
        return sass
    result.registers, result.stack = int(found[1]), int(found[2])
    mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, flags=re.M)
    result.sass = dict(Counter(mnemonics).most_common())
    return sass


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, flag, path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def compile_module(name: str, targets: Sequence[int] = TARGETS, keep: Path | None = None) -> list[Result]:
    """Everything `nvfp4_runtime.kernels.<name>` declares."""
    module = importlib.import_module(name)
    listed: list[Compilation] = module.compilations()
    return [compile_for(name, what, t, keep) for what in listed for t in what.targets if t in targets]


def main(argv: Sequence[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.kernels.triton.ahead", description=__doc__)
    parser.add_argument("modules", nargs="+", help="e.g. nvfp4_runtime.kernels.triton.linear_kernels")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--keep", type=Path, help="write PTX and SASS into this folder")
    args = parser.parse_args(argv)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    failed = 0
    for module in args.modules:
        for result in compile_module(module, args.targets, args.keep):
            print(json.dumps(asdict(result)), flush=True)
            failed += bool(result.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
