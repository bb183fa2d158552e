"""Which tensors of the files belong to which module: transformers renames some when it loads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class HubNames:
    """Paths of a transformers model's modules and parameters to the names that the files use.

    Where transformers joins or stacks tensors (experts), their common container is what is found here.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        self._stored: dict[str, str] = {}
        prefix = f"{model.base_model_prefix}."
        parameters = set(model.state_dict())
        for name in stored:
            path, _ = rename_source_key(name, renamings, [])
            if path not in parameters and f"{prefix}{path}" in parameters:
                path = f"{prefix}{path}"  # saved from the model without its head
            self._stored.setdefault(path, name)
            self._add_parents(path, name)

    def _add_parents(self, path: str, name: str) -> None:
        """Containers too, as far up as both spellings end alike."""
        while path and name and path.rpartition(".")[2] == name.rpartition(".")[2]:
            path, name = path.rpartition(".")[0], name.rpartition(".")[0]
            if path in self._stored:
                return
            self._stored[path] = name

    def __call__(self, path: str) -> str:
        """The files' name of `path`; `path` itself where nothing is stored under it, for an error to name."""
        return self._stored.get(path, path)
