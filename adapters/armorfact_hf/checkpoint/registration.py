"""Make transformers and PEFT know pruned models without importing them.

transformers takes seconds to import, which a command that only prints its help should not. So what they need is
registered at once where they are loaded already, and else right after they are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# What registers, by the module of another package that has to be there before.
REGISTRIES = {
    "transformers.quantizers.auto": "armorfact_hf.checkpoint.quantizer",
    "peft.tuners.lora": "armorfact_hf.peft.injection",
}


class _OnImport(MetaPathFinder):
    """Steps aside once: lets the registry be imported as ever, and registers."""

    def __init__(self, registry: str, registering: str) -> None:
        self.registry, self.registering = registry, registering

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(self.registering)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now, or when the other package is imported."""
    for registry, registering in REGISTRIES.items():
        if registry in sys.modules:
            import_module(registering)
        else:
            sys.meta_path.insert(0, _OnImport(registry, registering))
