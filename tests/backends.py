"""What tests that run over every backend share."""

from __future__ import annotations

import pytest

from nvfp4_runtime.kernels.ops import Backend, OpSpec


def skip_if_refused(backend: Backend, spec: OpSpec) -> None:
    """Skip with the backend's own reason; `--require-backend NAME` makes it a failure."""
    if (reason := backend.refuses(spec)) is not None:
        pytest.skip(f"backend {backend.name} refuses {spec}: {reason}")
