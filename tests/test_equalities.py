"""Bit for bit or to rounding: no test asks floating-point kernels for equal bits (see CONTRIBUTING.md)."""

import ast
import re
from pathlib import Path

import pytest
import torch

from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


FILES = sorted(Path(__file__).parent.rglob("*.py"))
EXACT = {"equal", "array_equal", "assert_equal", "assert_array_equal"}
# What models and losses compute; weights, masks, indices and counts have other names.
RESULT = re.compile(r"(\w*_)?(logits|logits_of|hidden|hidden_states?|loss|losses|outputs?|predictions|embeddings)")


def names_of(node):
    """What an expression is called: the last name of a chain, of each operand, and of what a method is called on."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Subscript):
        key = node.slice
        return names_of(node.value) | ({key.value} if isinstance(key, ast.Constant) else set())
    if isinstance(node, ast.Call):
        inner = names_of(node.func.value) if isinstance(node.func, ast.Attribute) else set()
        inside = node.args if isinstance(node.func, ast.Name) and node.func.id == "float" else []
        return names_of(node.func) | inner | {name for argument in inside for name in names_of(argument)}
    if isinstance(node, ast.BinOp):
        return names_of(node.left) | names_of(node.right)
    return set()


def is_result(node):
    return any(RESULT.fullmatch(name.rpartition("/")[0] or name) for name in names_of(node) if isinstance(name, str))


def exact_results(source):
    """The lines that compare results of kernels bit for bit, in a program and in the programs it holds as text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in EXACT:
            if any(is_result(argument) for argument in node.args):
                yield ast.unparse(node)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) and len(node.ops) == 1:
            if is_result(node.left) and is_result(node.comparators[0]):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            yield from exact_results(node.value)


def test_the_check_sees_what_it_forbids():
    program = 'A = """\\nimport torch\\nassert torch.equal(model(**batch).logits, expected)\\n"""\n'
    for forbidden in (
        "torch.equal(a(x).logits, b)", "torch.equal(logits_of(a, batch)[0], dense)", "np.array_equal(loss, other)",
        "not torch.equal(hidden[0], other)", "assert first.loss == second.loss", program,
        "assert one['eval_loss'] == other['eval_loss']", "assert float(loss) == float(x.hidden_state.sum())",
    ):  # fmt: skip
        assert len(list(exact_results(forbidden))) == 1, forbidden
    for allowed in (
        "torch.equal(layer.output.dense.weight, before)", "torch.equal(mask, logits == 0)", "assert loss == 0",
        "assert one.loss == pytest.approx(other.loss)", "torch.equal(before[name], weights)",
    ):  # fmt: skip
        assert list(exact_results(allowed)) == [], allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_are_compared_to_rounding(path):
    if path != Path(__file__):
        assert list(exact_results(path.read_text())) == []


@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_what_rounding_is(dtype, step):
    for size in (0.1, 1.0, 300.0):
        value = torch.full((3,), size, dtype=dtype)
        # A result that large is the sum of parts that large.
        near, far = (value + factor * step * max(1.0, size) for factor in (0.5, 2.0))
        assert_equal_to_rounding(near, value)
        assert not differ_beyond_rounding(near, value)
        assert differ_beyond_rounding(far, value)
        with pytest.raises(AssertionError, match="not close"):
            assert_equal_to_rounding(far, value)
