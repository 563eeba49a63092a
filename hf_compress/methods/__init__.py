"""All methods: one for each folder here, and those of other installed packages.

Another package announces a method by an entry point `<name> = <module>:METHOD` of the group `hf_compress.methods`; the
module is made like the folders here. The table is computed from both when it is first needed: nothing registers
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules

from hf_compress.core.method import Method


GROUP = "hf_compress.methods"


def _own() -> Iterator[Method]:
    for entry in iter_modules(__path__):
        if entry.ispkg:
            yield import_module(f"{__name__}.{entry.name}").METHOD


def _announced(entry: EntryPoint) -> Method:
    """Load the method of another package.

    Raises:
        ValueError: If it cannot be loaded. It is not skipped, because models with its steps could not be opened.
    """
    owner = f"the entry point {entry.name} = {entry.value} of {entry.dist.name if entry.dist else 'a distribution'}"
    try:
        method = entry.load()
    except Exception as error:
        raise ValueError(
            f"A compression method cannot be loaded: {owner} fails with {type(error).__name__}: {error} "
            "Repair or uninstall that distribution."
        ) from error
    if not isinstance(method, Method) or method.name != entry.name:
        raise ValueError(
            f"A compression method cannot be loaded: {owner} gives {getattr(method, 'name', method)!r}, which is no "
            f"Method named {entry.name!r}. Repair or uninstall that distribution."
        )
    return method


def all_methods() -> dict[str, Method]:
    """Name -> method.

    Raises:
        ValueError: If a package announces a method that cannot be loaded, or whose name another method has.
    """
    found = {method.name: method for method in _own()}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        method = _announced(entry)
        if method.name in found:
            raise ValueError(
                f"Two compression methods are named {method.name}: {found[method.name].config_class.__module__} and "
                f"{method.config_class.__module__}. Uninstall one of the distributions."
            )
        found[method.name] = method
    return found


METHODS: dict[str, Method] = all_methods()
