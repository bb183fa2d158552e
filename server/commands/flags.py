"""Types of flags that several commands share, and what the system's own errors mean for whoever typed them."""

from __future__ import annotations

import argparse
import errno
import os

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
KV_DTYPES = ("auto", "bf16", "fp8", "nvfp4", "float32")
_REMEDIES = {
    errno.EACCES: "look at its owner and mode, or choose another path",
    errno.EPERM: "look at its owner and mode, or choose another path",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some space, or choose a path on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; correct the path",
    errno.EISDIR: "a file is expected there; correct the path",
    errno.ELOOP: "its symbolic links lead in a circle; correct them",
    errno.ENOENT: "look whether the path is right and still there",
    errno.EIO: "the device fails: look at the system's log",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "the machine has no memory left: free some",
}


def kv_dtype(text: str) -> str:
    """One of KV_DTYPES, as the engine calls it. The long name of bf16 is taken as well."""
    if text not in (*KV_DTYPES, "bfloat16"):
        raise argparse.ArgumentTypeError(f"expected {', '.join(KV_DTYPES[:-1])} or {KV_DTYPES[-1]}, found {text!r}")
    return "bfloat16" if text == "bf16" else text


def whole(text: str) -> int:
    """A whole number of at most 64 bits, which is what engine and kernels count with."""
    try:
        number = int(text)
    except ValueError:
        number = 1 << 64
    if not -(1 << 63) <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 64 bits, found {text[:40]!r}")
    return number


def size(text: str) -> int:
    """A size such as 512MiB, 2G or 1073741824. Units are powers of 1024."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        found = int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GiB or 512MiB, found {text!r}")
    return found


def path(text: str) -> str:
    """A path with a leading ~ expanded: shells do that for words, not after = and not in the environment."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, found {text[:40]!r}, which holds a NUL: remove it")
    return os.path.expanduser(text)


def describe(error: OSError) -> str:
    """One line on an error of the system: what failed, on which path, what to do."""
    what = error.strerror or str(error) or type(error).__name__
    paths = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f": {' -> '.join(paths)}" if paths else ""
    remedy = _REMEDIES.get(error.errno) if error.errno is not None else None
    return f"{what}{where}" + (f"; {remedy}" if remedy else "")
