"""Examples and benchmarks: what they import exists; examples do with public names."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import hf_compress


ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def imports(path):
    """(module, name) of everything that a program imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hf_compress":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.partition(".")[0] == "hf_compress")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_exist(path):
    missing = [
        f"{module}.{name}"
        for module, name in imports(path)
        if name is not None and not hasattr(import_module(module), name)
    ]
    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_examples_use_public_names_only(path):
    assert list(imports(path)) == [("hf_compress", None)]
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hc"
    }
    assert used
    assert used <= set(hf_compress.__all__)
