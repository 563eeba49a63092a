"""What our trainers override of transformers' Trainer, and what of that is private."""

import ast
import importlib
import inspect
import pkgutil

from transformers import Trainer

import hf_compress.training


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_overrides():
    """(module, class, method) of every private method of Trainer that a class of ours defines."""
    for module in pkgutil.iter_modules(hf_compress.training.__path__):
        loaded = importlib.import_module(f"hf_compress.training.{module.name}")
        for kind in vars(loaded).values():
            if inspect.isclass(kind) and issubclass(kind, Trainer) and kind.__module__ == loaded.__name__:
                names = filter(_is_private, vars(kind))
                yield from ((module.name, kind, name) for name in names if hasattr(Trainer, name))


def test_few_private_methods_are_overridden_and_each_says_why():
    found = list(private_overrides())
    assert 0 < len(found) <= 4, found
    for _, kind, name in found:
        assert "# Private:" in inspect.getsource(vars(kind)[name]), f"{kind.__name__}.{name} does not say why"


def test_no_private_attribute_of_another_object_is_set():
    for module in pkgutil.iter_modules(hf_compress.training.__path__):
        loaded = importlib.import_module(f"hf_compress.training.{module.name}")
        for node in ast.walk(ast.parse(inspect.getsource(loaded))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_private(node.attr):
                owner = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
                assert owner == "self", f"{module.name} sets {owner}.{node.attr}"
