"""torch imported the quick way is torch: models run without the rules for meta tensors, which come in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY
from tests.tiny import tiny_nvfp4_llama

PRELUDE = """
import sys
from nvfp4_runtime.engine.torch_import import RULES, import_torch
import_torch()
import torch
assert RULES not in sys.modules, "what this is for: torch imports it no more, or not by this way"
assert not hasattr(torch, "_meta_registrations")
from nvfp4_runtime.engine.torch_import import _RulesFirst
assert isinstance(sys.meta_path[0], _RulesFirst)
"""
# torch.cdist on the CPU has no meta kernel but the one among the rules
RULES_ARE_THERE = """
assert sys.modules[RULES].__file__.endswith("_meta_registrations.py")
assert torch._meta_registrations is sys.modules[RULES]
assert not any(isinstance(finder, _RulesFirst) for finder in sys.meta_path)
assert torch.cdist(torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")).shape == (3, 5)
"""


def run(*lines: str) -> None:
    code = PRELUDE + "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "torch._meta_registrations",  # the rules themselves
        "torch._prims",  # what the rules bring
        "torch.utils._content_store",  # what cannot be imported before torch._prims
        "torch._dynamo",
    ],
)
def test_the_rules_come_before_any_further_module(name: str) -> None:
    run(
        f"import {name}, importlib",
        f"module = sys.modules['{name}']",
        "spec = module.__spec__",
        f"assert spec.name == '{name}' and spec.origin == module.__file__",
        f"assert importlib.import_module('{name}') is module",
        RULES_ARE_THERE,
    )


def test_fake_tensors_work() -> None:
    run(
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "with FakeTensorMode():",
        "    q, k, v = (torch.empty(1, 2, 8, 16) for _ in 'qkv')",
        "    assert torch.nn.functional.scaled_dot_product_attention(q, k, v).shape == (1, 2, 8, 16)",
        "    assert torch.cdist(torch.empty(3, 4), torch.empty(5, 4)).shape == (3, 5)",
    )


def test_an_engine_never_asks_for_the_rules(tmp_path: Path) -> None:
    tiny_nvfp4_llama(tmp_path)
    run(
        "from nvfp4_runtime import LLM, SamplingParams",
        f"llm = LLM({str(tmp_path)!r}, num_blocks=64)",
        "params = SamplingParams(temperature=0.9, seed=1, max_tokens=8, logprobs=2, prompt_logprobs=1)",
        "assert len(llm.generate(['a', 'b'], params)[1].token_ids) == 8",
        "assert RULES not in sys.modules and isinstance(sys.meta_path[0], _RulesFirst)",
    )


def test_it_is_harmless_where_torch_is_there_already() -> None:
    run(
        "before, finders = dict(sys.modules), list(sys.meta_path)",
        "import_torch()",
        "assert dict(sys.modules) == before",
    )
