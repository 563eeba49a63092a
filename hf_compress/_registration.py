"""Announces the loader to transformers without importing it.

transformers imports its quantizer registry (and torch) only when a model class is first touched. Registering at
once would make `import hf_compress` pay for that; so a finder waits for the registry's import and registers then.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


_REGISTRY = "transformers.quantizers.auto"
_LOADER = "hf_compress.loading"


class _ThenRegister(Loader):
    """Runs the registry's own loader, then imports ours."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        # Tools that ask a module for its source or loader should see the real one.
        module.__loader__ = module.__spec__.loader = self.original
        import_module(_LOADER)


class _RegistryFinder(MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_needed() -> None:
    """Register the loader now if transformers' registry is loaded, else as soon as it is."""
    if _REGISTRY in sys.modules:
        import_module(_LOADER)
    else:
        sys.meta_path.insert(0, _RegistryFinder())
