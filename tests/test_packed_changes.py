"""A layer with a packed weight computes what its weight says now, however it was changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_compress as hc
from hf_compress.methods.weight_pruning.kernels import Format


pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="CSR needs MKL")


def _row(weight):
    weight.data[5] *= 2


def _column(weight):
    weight.data[:, 3] = 0


def _numpy(weight):
    array = weight.detach().numpy()
    array *= 2


def _new_data(weight):
    weight.data = weight.data * 2


def _in_place(weight):
    with torch.no_grad():
        weight.mul_(2)


CHANGES = {
    "in place": _in_place,
    "through .data": lambda weight: weight.data.mul_(2),
    "zeros filled": lambda weight: weight.data.add_(0.01),
    "other .data": _new_data,
    "numpy": _numpy,
    "one row": _row,
    "one column": _column,
    "another model's": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    "signs": lambda weight: weight.data.neg_(),
}


@pytest.fixture
def packed():
    """A model of one packed layer, and how often its sparse kernel has run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    model[0].weight.data *= torch.rand(96, 64) > 0.9
    assert hc.accelerate_for_inference(model).packed == ["0"]
    calls, form = [], model[0].pack.form
    model[0].pack.form = Format(
        "csr", form.obstacle, form.pack, lambda *args: calls.append(1) or form.linear(*args), 128
    )
    return model, calls


@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_changed_weights_run_dense(packed, change):
    model, calls = packed
    inputs = torch.randn(7, 64)
    model(inputs)
    assert len(calls) == 1
    CHANGES[change](model[0].weight)
    assert torch.allclose(model(inputs), F.linear(inputs, model[0].weight, model[0].bias), atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("cast", [
    lambda model: model.bfloat16().float(), lambda model: model.half().float(), lambda model: model.to("cpu"),
    lambda model: model.double().float(),
], ids=["bfloat16", "half", "to", "double"])  # fmt: skip
@torch.no_grad()
def test_cast_and_back(packed, cast):
    model, calls = packed
    cast(model)
    inputs = torch.randn(7, 64)
    assert torch.allclose(model(inputs), F.linear(inputs, model[0].weight, model[0].bias), atol=1e-6)
    assert calls == []


@torch.no_grad()
def test_loaded_weights_run_dense_and_copies_do_not_disturb(packed):
    model, calls = packed
    inputs, other = torch.randn(7, 64), {name: torch.randn_like(v) for name, v in model.state_dict().items()}
    copy.deepcopy(model).load_state_dict(other)
    model(inputs)
    assert len(calls) == 1
    model.load_state_dict(other)
    assert torch.allclose(model(inputs), F.linear(inputs, other["0.weight"], other["0.bias"]), atol=1e-5)
    assert len(calls) == 1
