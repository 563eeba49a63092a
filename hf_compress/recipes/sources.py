"""Finds the source code that a stage can run, so that a change elsewhere does not make its results old."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from hf_compress.methods import METHODS
from hf_compress.stages.table import Stage


_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(str(sys.modules[_PACKAGE].__file__)).parent
# What is reached without an import that names it: the loader and the students that transformers' tables call, and all
# methods. What fills the arguments of a stage decides its result, too.
_ALWAYS = (f"{_PACKAGE}.loading", f"{_PACKAGE}.methods", f"{_PACKAGE}.students")
_FILLING = (_PACKAGE, f"{_PACKAGE}.cli.commands", f"{_PACKAGE}.cli.parsing", f"{_PACKAGE}.stages.table")


def modules_of(stage: Stage) -> frozenset[str]:
    """The modules of this package that a stage can run.

    Args:
        stage: The stage.

    Returns:
        Its own modules, all methods and students, the loader, what any of these import, at the top of a file or within
        a function, and what fills its arguments.

    Example:
        >>> from hf_compress.stages.table import STAGES
        >>> finetune = modules_of(STAGES["finetune"])
        >>> "hf_compress.training.trainer" in finetune, "hf_compress.hub.upload" in finetune
        (True, False)
    """
    own = {path.rpartition(".")[0] for path in (stage.run, stage.arguments)}
    ahead = [name for name in _files() if name in own or name.startswith(_ALWAYS)]
    found: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += _imported(name)
    return frozenset(found | set(_FILLING))


def sources_of(stage: Stage) -> str:
    """A digest of the source code that a stage can run, and of all packages that add methods."""
    return _digest(modules_of(stage))


@functools.cache
def _digest(modules: frozenset[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = {name: _files()[name] for name in modules}
    homes = {method.config_class.__module__.partition(".")[0] for method in METHODS.values()} - {_PACKAGE}
    for home in homes:
        root = Path(str(sys.modules[home].__file__)).parent
        files |= {f"{home}: {file.relative_to(root)}": file for file in root.rglob("*.py")}
    for name, file in sorted(files.items()):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _files() -> dict[str, Path]:
    """Module of this package -> its file."""
    found = {}
    for file in sorted(_ROOT.rglob("*.py")):
        parts = (_PACKAGE, *file.relative_to(_ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def _imported(module: str) -> tuple[str, ...]:
    """The modules of this package that one imports, with the packages that hold them."""
    names = set()
    for target in _targets(ast.parse(_files()[module].read_text(encoding="utf-8"))):
        parts = target.split(".")
        names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return tuple(sorted(names & _files().keys()))


def _targets(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is taken from a package may be a module of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
