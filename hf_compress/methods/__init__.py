"""All methods, computed from the folders here: a new method is a new folder and no other edit."""

from importlib import import_module
from pkgutil import iter_modules

from hf_compress.core.method import Method


METHODS: dict[str, Method] = {
    method.name: method
    for method in (import_module(f"{__name__}.{entry.name}").METHOD for entry in iter_modules(__path__) if entry.ispkg)
}
