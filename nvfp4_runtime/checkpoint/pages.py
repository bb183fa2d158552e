"""Give back the pages of mapped files whose contents have been copied elsewhere."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

MADV_DONTNEED = 4  # Linux, every architecture


def release_pages(files: Iterable[Path]) -> int:
    """Drop this process's pages of every map of `files`; returns how many bytes of maps that were.

    The maps stay valid: what is read again comes from the page cache (or the disk). Without this, weights that were
    repacked count twice against the process, once as the file and once as the copy. Only maps that were never written
    may be given: private changes would be lost. Does nothing where there is no Linux.
    """
    if not sys.platform.startswith("linux"):
        return 0
    names = {str(file.resolve()) for file in files}
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] not in names:
            continue
        start, end = (int(x, 16) for x in fields[0].split("-"))
        if madvise(start, end - start, MADV_DONTNEED) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), fields[5])
        total += end - start
    return total
