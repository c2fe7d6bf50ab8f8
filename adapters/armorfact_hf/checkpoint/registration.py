"""Make transformers know pruned models without importing it.

transformers takes seconds to import, which a command that only prints its help should not. So the quantizer is
registered at once where transformers' registry is loaded already, and else right after it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


class _OnImport(MetaPathFinder):
    """Steps aside once: lets the registry be imported as ever, and registers."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("armorfact_hf.checkpoint.quantizer")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now, or when transformers is imported."""
    if REGISTRY in sys.modules:
        import_module("armorfact_hf.checkpoint.quantizer")
    else:
        sys.meta_path.insert(0, _OnImport())
