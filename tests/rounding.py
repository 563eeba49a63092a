"""Results of floating-point kernels are compared to rounding; weights, masks, indices and files bit for bit.

Why: see "What is equal to what" in CONTRIBUTING.md. `tests/test_equalities.py` refuses bit equality of results.
"""

import torch


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
