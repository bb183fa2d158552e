"""`make check-neon`: the native core compiled for processors this machine is not, and run where an emulator is at hand.

Everything but the binding is cross-compiled by the `ziglang` package and linked with csrc/digest.cpp, which hashes
what each kernel computes. With qemu-aarch64 (Debian: qemu-user-static) on PATH it also runs: NEON must give the bits of
AVX2, which has the same trees and fused operations, and portable those of portable. Of this machine's own variants amx
must give the bits of avx512, and avx2vnni those of avx2, where both run. What was only compiled is said. Needs the
standard library, ziglang and, for this machine's own side, its C++ compiler (CXX, or c++): a static program by ziglang
finds no AVX2 on some machines that have it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CSRC = REPOSITORY / "nvfp4_runtime/kernels/cpu/csrc"
DIGEST = Path(__file__).parent / "csrc/digest.cpp"
AVX2 = ["-DNVFP4_ISA=avx2", "-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mfma", "-mf16c"]
VARIANTS: dict[str, dict[str, list[str]]] = {  # by processor, the flags of each ISA variant as in CMakeLists.txt
    "aarch64": {
        "neon": ["-DNVFP4_ISA=neon", "-DNVFP4_NEON"],
        "dotprod": ["-DNVFP4_ISA=dotprod", "-DNVFP4_NEON", "-mcpu=generic+dotprod"],
        "portable": ["-DNVFP4_ISA=portable"],
    },
    "riscv64": {"portable": ["-DNVFP4_ISA=portable"]},
    "x86_64": {
        "avx2": AVX2,
        "avx2vnni": ["-DNVFP4_ISA=avx2vnni", *AVX2[1:], "-mavxvnni"],
        "avx512": ["-DNVFP4_ISA=avx512", *AVX512],
        "avx512bf16": ["-DNVFP4_ISA=avx512bf16", "-mavx512bf16", *AVX512],
        "amx": ["-DNVFP4_ISA=amx", *AVX512, "-mamx-tile", "-mamx-bf16"],
        "portable": ["-DNVFP4_ISA=portable"],
    },
}
HERE = "x86_64"
# Variants of this machine's that its compiler may lack: what isa.cpp wants to hear where they are built.
CHOICES = {"avx2vnni": "-DNVFP4_AVX2VNNI", "amx": "-DNVFP4_AMX"}
SAME_BITS = {"neon": "avx2", "dotprod": "avx2", "portable": "portable"}  # variant elsewhere -> variant here
SAME_HERE = {"avx2vnni": "avx2", "amx": "avx512"}  # both here
NOT_OF_ZIG = ("-fno-tree-slp-vectorize", "-Wno-maybe-uninitialized")


def kernel_flags() -> list[str]:
    """The flags CMakeLists.txt gives to every variant."""
    found = re.search(r"set\(kernel_flags ([^)]*)\)", (REPOSITORY / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt no longer sets kernel_flags in one line"
    return found.group(1).split()


def compile_elsewhere(cpu: str, folder: Path) -> Path:
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", f"{cpu}-linux-musl"]
    flags = [flag for flag in kernel_flags() if flag not in NOT_OF_ZIG]
    return compile_with(compiler, VARIANTS[cpu], flags, [], folder / cpu)


def compile_here(folder: Path) -> Path | None:
    """None where there is no C++ compiler. Variants that it does not know are left out, by name."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    (folder / HERE).mkdir()
    empty = folder / HERE / "empty.cpp"
    empty.touch()
    known = {}
    for name, flags in VARIANTS[HERE].items():
        tried = subprocess.run(
            [compiler, *flags, "-c", str(empty), "-o", str(empty.with_suffix(".o"))], capture_output=True
        )
        if name in CHOICES and tried.returncode:
            print(f"{HERE}: {compiler} does not know {name}")
        else:
            known[name] = flags
    return compile_with(
        [compiler], known, kernel_flags(), [CHOICES[name] for name in known if name in CHOICES], folder / HERE
    )


def compile_with(
    compiler: list[str], variants: dict[str, list[str]], flags: list[str], choices: list[str], folder: Path
) -> Path:
    """A static program of the core and digest.cpp. Exits with the compiler's words if one file fails."""
    folder.mkdir(exist_ok=True)
    common = [*compiler, "-std=c++17"]
    jobs = [
        [*common, *flags, *of_variant, "-c", str(CSRC / "kernels.cpp"), "-o", str(folder / f"{name}.o")]
        for name, of_variant in variants.items()
    ]
    for source in (
        *(p for p in sorted(CSRC.glob("*.cpp")) if p.stem not in ("kernels", "module", "module_decoder")),
        DIGEST,
    ):
        output = str(folder / f"{source.stem}.o")
        jobs.append([*common, "-O2", "-Wall", "-Wextra", *choices, f"-iquote{CSRC}", "-c", str(source), "-o", output])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))
    program = folder / "digest"
    run([*common, "-static", *(job[-1] for job in jobs), "-o", str(program)])
    print(f"{folder.name}: {', '.join(variants)} compiled and linked", flush=True)
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def digests(output: str) -> dict[str, dict[str, str]]:
    """ISA variant -> op -> hash."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        isa, op, value = line.split()
        found.setdefault(isa, {})[op] = value
    return found


def compare(what: str, ops: dict[str, str], twins: dict[str, str], twin: str) -> int:
    """Says how many ops differ, and gives their number."""
    different = [op for op in ops if ops[op] != twins[op]]
    print(f"{what} ran {len(ops)} ops, {len(different)} differ from {twin} here", *different)
    return len(different)


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = {cpu: compile_elsewhere(cpu, folder) for cpu in ("aarch64", "riscv64")}
        ours = compile_here(folder) if platform.machine() == HERE else None
        if ours is None:
            print("compiled only: running needs an x86-64 machine and its C++ compiler")
            return 0
        here = digests(run([str(ours)]))
        wrong = sum(
            compare(f"{HERE}: {isa}", here[isa], here[twin], twin)
            for isa, twin in SAME_HERE.items()
            if isa in here and twin in here
        )
        for cpu, program in programs.items():
            emulator = shutil.which(f"qemu-{cpu}-static") or shutil.which(f"qemu-{cpu}")
            if emulator is None:
                print(f"{cpu}: compiled only, no qemu-{cpu} on PATH (Debian: qemu-user-static)")
                continue
            there = digests(run([emulator, str(program)]))
            assert there.keys() == VARIANTS[cpu].keys(), f"{cpu} ran {sorted(there)}"
            for isa, ops in there.items():
                twin = SAME_BITS[isa]
                if twin in here:
                    wrong += compare(f"{cpu}: {isa}", ops, here[twin], twin)
                else:
                    print(f"{cpu}: {isa} ran; this machine has no {twin} to compare with")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
