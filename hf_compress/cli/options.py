"""The flags of a command, read from the source of the dataclasses without importing them.

Importing torch and transformers takes many seconds; help should not. A field's help text is its entry in the `Args` of
the class's docstring; there is no second copy of it in the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any


_ROOT = Path(__file__).resolve().parents[2]
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag.

    Args:
        name: The field's name.
        kind: The field's annotation, as written.
        default: The default's value; `REQUIRED` when there is none.
        help: What it does, in one sentence or a few.
    """

    name: str
    kind: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The flags that fill one dataclass.

    Args:
        options: Its flags, those it inherits from our own classes first.
        training: Whether the class also inherits the flags of `TrainingArguments`.
    """

    options: tuple[Option, ...]
    training: bool


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


def read_group(path: str) -> Group:
    """The flags of a dataclass, from its source.

    Args:
        path: `package.module.Class`; a class outside this package has no flags of ours.
    """
    module, _, name = path.rpartition(".")
    if not module.startswith("hf_compress."):
        return Group((), True)
    classes = _classes(module)
    node = classes[name]
    docstring = ast.get_docstring(node) or ""
    inherited: dict[str, Option] = {}
    training = False
    for base in map(ast.unparse, node.bases):
        if base in classes:
            parent = read_group(f"{module}.{base}")
            inherited.update({option.name: option for option in parent.options})
            training = training or parent.training
        training = training or base == "TrainingArguments"
    texts = {option.name: option.help for option in inherited.values()} | argument_texts(docstring)
    for statement in node.body:
        option = _option(statement, texts)
        if option is not None:
            inherited[option.name] = option
    return Group(tuple(inherited.values()), training)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    source = (_ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _option(statement: ast.stmt, texts: dict[str, str]) -> Option | None:
    """The flag that a statement in a class body declares, if it declares one."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    kind, name, value = ast.unparse(statement.annotation), statement.target.id, statement.value
    if kind.startswith("ClassVar"):
        return None
    default: Any = REQUIRED
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if "metadata" in keywords and ast.literal_eval(keywords["metadata"]).get("output"):
            return None
        if "default_factory" in keywords:
            factory = keywords["default_factory"]
            empty = {"list": [], "dict": {}}
            default = (
                ast.literal_eval(factory.body) if isinstance(factory, ast.Lambda) else empty[ast.unparse(factory)]
            )
        elif "default" in keywords:
            default = ast.literal_eval(keywords["default"])
    elif value is not None:
        default = ast.literal_eval(value)
    return Option(name, kind, default, texts.get(name, ""))
