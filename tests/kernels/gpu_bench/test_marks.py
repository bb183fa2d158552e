"""Which tests `make test-gpu` selects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.conftest import pytest_collection_modifyitems


class Item:
    """As much of a collected test as the hook looks at."""

    def __init__(self, *fixtures: str) -> None:
        self.fixturenames = fixtures
        self.marks: list[str] = []

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


@pytest.mark.parametrize("there_is_one", [True, False])
def test_tests_of_triton_kernels_are_gpu_tests_where_there_is_one(monkeypatch, there_is_one):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    items: list[Any] = [Item("triton_backend", "monkeypatch"), Item("place"), Item("tmp_path"), Item()]
    pytest_collection_modifyitems(items)
    found = [item.marks for item in items]
    assert found == ([["gpu"], ["gpu"], [], []] if there_is_one else [[], [], [], []])
