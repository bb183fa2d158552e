"""`make check-neon`: the native core compiled for processors this machine is not, and run where an emulator is at hand.

Everything but the binding is cross-compiled by the `ziglang` package and linked with csrc/digest.cpp, which hashes
what each kernel computes. With qemu-aarch64 (Debian: qemu-user-static) on PATH it also runs: NEON must give the bits of
AVX2, which has the same trees and fused operations, and portable those of portable. Without one, the last line says
"compiled only". Uses nothing outside the standard library and ziglang.
"""

from __future__ import annotations

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
CHOICES = {"x86_64": ["-DNVFP4_AVX2VNNI", "-DNVFP4_AMX"]}  # variants that isa.cpp knows only where they are built
SAME_BITS = {"neon": "avx2", "dotprod": "avx2", "portable": "portable"}  # variant elsewhere -> variant here


def kernel_flags() -> list[str]:
    """The flags CMakeLists.txt gives to every variant, less those this compiler does not know."""
    found = re.search(r"set\(kernel_flags ([^)]*)\)", (REPOSITORY / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt no longer sets kernel_flags in one line"
    return [
        flag for flag in found.group(1).split() if flag not in ("-fno-tree-slp-vectorize", "-Wno-maybe-uninitialized")
    ]


def compile_for(cpu: str, folder: Path) -> Path:
    """A static program of the core and digest.cpp for `cpu`. Exits with the compiler's words if one file fails."""
    common = [sys.executable, "-m", "ziglang", "c++", "-target", f"{cpu}-linux-musl", "-std=c++17"]
    jobs = [
        [*common, *kernel_flags(), *flags, "-c", str(CSRC / "kernels.cpp"), "-o", str(folder / f"{cpu}-{name}.o")]
        for name, flags in VARIANTS[cpu].items()
    ]
    for source in (
        *(p for p in sorted(CSRC.glob("*.cpp")) if p.stem not in ("kernels", "module", "module_decoder")),
        DIGEST,
    ):
        output = str(folder / f"{cpu}-{source.stem}.o")
        choices = CHOICES.get(cpu, [])
        jobs.append([*common, "-O2", "-Wall", "-Wextra", *choices, f"-iquote{CSRC}", "-c", str(source), "-o", output])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))
    program = folder / f"digest-{cpu}"
    run([*common, "-static", *(job[-1] for job in jobs), "-o", str(program)])
    print(f"{cpu}: {', '.join(VARIANTS[cpu])} compiled and linked", flush=True)
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


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = {cpu: compile_for(cpu, folder) for cpu in ("aarch64", "riscv64")}
        emulators = {cpu: shutil.which(f"qemu-{cpu}-static") or shutil.which(f"qemu-{cpu}") for cpu in programs}
        if platform.machine() != "x86_64" or not any(emulators.values()):
            print("compiled only: running needs an x86-64 machine with qemu-aarch64 (Debian: qemu-user-static) on PATH")
            return 0
        here = digests(run([str(compile_for("x86_64", folder))]))
        wrong = 0
        for cpu, program in programs.items():
            emulator = emulators[cpu]
            if emulator is None:
                print(f"{cpu}: compiled only, no qemu-{cpu} on PATH")
                continue
            there = digests(run([emulator, str(program)]))
            assert there.keys() == VARIANTS[cpu].keys(), f"{cpu} ran {sorted(there)}"
            for isa, ops in there.items():
                twin = here.get(SAME_BITS[isa])
                if twin is None:
                    print(f"{cpu}: {isa} ran; this machine has no {SAME_BITS[isa]} to compare with")
                    continue
                different = [op for op in ops if ops[op] != twin[op]]
                print(
                    f"{cpu}: {isa} ran {len(ops)} ops, {len(different)} differ from {SAME_BITS[isa]} here", *different
                )
                wrong += len(different)
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
