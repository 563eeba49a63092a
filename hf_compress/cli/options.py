"""Reads the options of a command from the source of its dataclasses, without importing them.

Importing torch and transformers takes many seconds; help should not. The text of an option is its entry in the `Args`
of the class's docstring; there is no second copy of it in the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_compress.stages.table import Stage


REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: The field's name.
        kind: The field's annotation, as written.
        default: The default's value; `REQUIRED` when there is none.
        help: Its effect, in one sentence or a few.
    """

    name: str
    kind: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The options that fill one dataclass.

    Args:
        options: Its options, those it inherits from our own classes first.
        training: Whether the class also inherits the options of `TrainingArguments`.
    """

    options: tuple[Option, ...]
    training: bool


@dataclasses.dataclass(frozen=True)
class _Module:
    """The classes and imports of a source file.

    Args:
        classes: Name -> class.
        imports: Name -> `module.name` that it was imported from.
        tree: The whole file.
    """

    classes: dict[str, ast.ClassDef]
    imports: dict[str, str]
    tree: ast.Module


def argument_texts(docstring: str) -> dict[str, str]:
    """The `Args` of a docstring: name to text.

    Example:
        >>> argument_texts('Sum.\\n\\nArgs:\\n    a, b: Numbers\\n        to add.\\n\\nReturns:\\n    It.')
        {'a': 'Numbers to add.', 'b': 'Numbers to add.'}
    """
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring).splitlines():
        if re.match(r"\S", line):
            inside = line == "Args:"
        elif inside and (entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            names = entry[1].split(", ")
            texts.update({name: [entry[2].strip()] for name in names})
        elif inside and line.strip():
            for name in names:
                texts[name].append(line.strip())
    return {name: " ".join(lines) for name, lines in texts.items()}


def stage_groups(stage: Stage) -> dict[str, Group]:
    """Topic -> options of a stage, in the order of the fields of its arguments class."""
    module, _, name = stage.arguments.rpartition(".")
    found = {}
    for statement in _source(module).classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            path = _defined_at(module, ast.unparse(statement.annotation))
            if stage.method is not None and statement.target.id == "method":
                path = _config_class(stage.method)
            found[statement.target.id] = read_group(path or "")
    return found


def read_group(path: str) -> Group:
    """The options of a dataclass, from its source.

    Args:
        path: `package.module.Class`.
    """
    module, _, name = path.rpartition(".")
    if path.startswith("transformers."):
        return Group((), name == "TrainingArguments")
    if not module:
        return Group((), False)
    node = _source(module).classes[name]
    inherited: dict[str, Option] = {}
    training = False
    for base in map(ast.unparse, node.bases):
        parent = read_group(_defined_at(module, base) or "")
        inherited.update({option.name: option for option in parent.options})
        training = training or parent.training
    texts = {option.name: option.help for option in inherited.values()}
    texts |= argument_texts(ast.get_docstring(node) or "")
    for statement in node.body:
        option = _option(statement, texts)
        if option is not None:
            inherited[option.name] = option
    return Group(tuple(inherited.values()), training)


def class_fields(module: str, name: str) -> list[str]:
    """The names of the fields that a class of any installed package declares, in their order.

    Args:
        module, name: Where its source is, and its name there.
    """
    body = _source(module).classes[name].body
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    names = [ast.unparse(node.target) for node in fields if not ast.unparse(node.annotation).startswith("ClassVar")]
    return [name for name in names if not name.startswith("_")]


def _config_class(method: str) -> str | None:
    """The path of a method's config class.

    Args:
        method: `module` or `module:NAME`, where `NAME = Method(..., config_class=X)`; without a name: METHOD.
    """
    module, _, name = method.partition(":")
    name = name or "METHOD"
    for node in _source(module).tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Call):
            for keyword in node.value.keywords:
                if keyword.arg == "config_class":
                    return _defined_at(module, ast.unparse(keyword.value))
    imported = _source(module).imports.get(name)
    return _config_class(":".join(imported.rsplit(".", 1))) if imported else None


def _defined_at(module: str, name: str) -> str | None:
    """`module.Class` where a class that a module names is defined; None if only an import can tell."""
    found = _source(module)
    if name in found.classes:
        return f"{module}.{name}"
    path = found.imports.get(name)
    if path is None or path.startswith("transformers."):
        return path
    above, _, own = path.rpartition(".")
    return _defined_at(above, own) if above.partition(".")[0] == module.partition(".")[0] or _is_ours(above) else None


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


@cache
def _source(module: str) -> _Module:
    tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = {
        alias.asname or alias.name: f"{_absolute(node, module)}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return _Module(classes, imports, tree)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that `from ... import` names, relative or not."""
    if not node.level:
        return node.module or ""
    package = module if _file_of(module).name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def _file_of(module: str) -> Path:
    top, *rest = module.split(".")
    # Looks for a top-level package without importing it.
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise ValueError(f"The source of module {module!r} cannot be found: is its package still installed?")
    if not rest:
        return Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _option(statement: ast.stmt, texts: dict[str, str]) -> Option | None:
    """The option that a statement in a class body declares, if it declares one."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    kind, name, value = ast.unparse(statement.annotation), statement.target.id, statement.value
    if kind.partition("[")[0].rpartition(".")[2] == "ClassVar":
        return None
    default: Any = REQUIRED
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if "metadata" in keywords and _value(keywords["metadata"]).get("output"):
            return None
        if "default_factory" in keywords:
            factory = keywords["default_factory"]
            empty: dict[str, Any] = {"list": [], "dict": {}}
            default = _value(factory.body) if isinstance(factory, ast.Lambda) else empty[ast.unparse(factory)]
        elif "default" in keywords:
            default = _value(keywords["default"])
    elif value is not None:
        default = _value(value)
    return Option(name, kind, default, texts.get(name, ""))


def _value(node: ast.expr) -> Any:
    """The value of an expression; its text if only running it gives the value."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
