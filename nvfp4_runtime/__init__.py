"""NVFP4 inference runtime: load packed NVFP4 checkpoints, serve them over a paged KV cache, make new ones.

`LLM` is the offline door; importing this package needs neither torch, a GPU nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nvfp4_runtime.llm import LLM as LLM
    from nvfp4_runtime.sampling.params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from nvfp4_runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from nvfp4_runtime.sampling.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
