"""The memory that weights lie in decides how kernels add; what a model says stays equal to rounding."""

import copy

import pytest
import torch

from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from tests.contract.conftest import assert_same_outputs, logits_of


HEAD = "sequence_classification"


@torch.no_grad()
def moved(model):
    """A copy whose weights each begin one number after a cache line, as those read from a file may."""
    twin = copy.deepcopy(model)
    for value in [*twin.parameters(), *twin.buffers()]:
        numbers = torch.empty(value.numel() + 32, dtype=value.dtype)
        start = -numbers.data_ptr() % 64 // value.element_size() + 1
        numbers[start : start + value.numel()] = value.flatten()
        value.data = numbers[start : start + value.numel()].view(value.shape)
        assert value.data_ptr() % 64 == value.element_size()
    return twin


def assert_moves(model, batch):
    twin = moved(model)
    assert_same_outputs(twin, model, batch)
    ours, theirs = twin.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compressed_models(compressed, batch, method, architecture, dtype):
    model = compressed(method, architecture, HEAD).to(dtype)
    twin, seen = assert_moves(model, batch(model)), batch(model)
    if method == "token_pruning":
        states = LiveTokens(), LiveTokens()
        for each, state in zip((model, twin), states, strict=True):
            logits_of(each, {**seen, "forward_state": state})
        kept = [{layer: state.kept_after(layer).tolist() for layer in state.packings} for state in states]
        assert kept[0] == kept[1] != {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_models(model, batch, architecture, dtype):
    dense = model(architecture, HEAD).to(dtype)
    assert_moves(dense, batch(dense))
