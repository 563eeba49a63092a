"""Results of floating-point kernels are compared to rounding; weights, masks, indices and files bit for bit.

Why: see "What is equal to what" in CONTRIBUTING.md. `tests/test_equalities.py` refuses bit equality of results.
"""

import pytest
import torch

import hf_compress as hc


# Of results of size one, after the few layers that the models of the tests have.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def tolerance_of(reference):
    """The largest difference that rounding makes, for the dtype and the largest value of `reference`."""
    largest = float(reference.detach().abs().max()) if reference.numel() else 0.0
    return ROUNDING[reference.dtype] * max(1.0, largest)


def assert_equal_to_rounding(found, expected):
    """One formula, computed on other memory or by another route."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance_of(expected))


def differ_beyond_rounding(found, expected):
    """Whether two results of one shape say something else."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max()) > tolerance_of(expected)


def assert_compressed_alike(found, expected):
    """Two models that went through the same steps: the same sizes, weights and settings computed from data apart."""
    for ours, theirs in zip(hc.steps_of(found), hc.steps_of(expected), strict=True):
        computed = {name for name, value in theirs.items() if isinstance(value, float)}
        assert {name: ours[name] for name in ours.keys() - computed} == {
            name: theirs[name] for name in theirs.keys() - computed
        }
        assert [ours[name] for name in sorted(computed)] == pytest.approx([theirs[name] for name in sorted(computed)])
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.is_floating_point():
            assert_equal_to_rounding(ours[name], value)
