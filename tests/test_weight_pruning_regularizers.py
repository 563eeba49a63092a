"""Group lasso against a minimiser that knows only its definition, and in a training against plain steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import hf_compress as hc
from hf_compress.methods.weight_pruning.patterns import BlockPattern
from hf_compress.methods.weight_pruning.regularizers import group_lasso


@pytest.mark.parametrize("strength", [0.05, 0.4, 3.0])
def test_a_proximal_step_minimises_what_defines_it(strength):
    """Each block alone: half the squared distance plus `strength sqrt(size)` times the norm."""
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = (weight * group_lasso(weight, BlockPattern(3, 2), strength)).numpy()
    for top in range(0, 7, 3):
        for left in range(0, 4, 2):
            start = weight[top : top + 3, left : left + 2].numpy().ravel()

            def cost(block, start=start):
                return 0.5 * ((block - start) ** 2).sum() + strength * block.size**0.5 * np.linalg.norm(block)

            found = minimize(cost, start, method="Powell", options={"xtol": 1e-10, "ftol": 1e-14}).x
            block = ours[top : top + 3, left : left + 2].ravel()
            assert cost(block) <= cost(found) + 1e-9
            if strength < 3:
                assert np.abs(block - found).max() < 1e-3


def test_half_precision_keeps_small_blocks():
    """Squares of 1e-4 vanish in float16, and a zero block at a rate of zero is no NaN."""
    weight = torch.tensor([[1e-4, 0.0], [1e-4, 0.0]], dtype=torch.float16)
    assert group_lasso(weight, BlockPattern(2, 1), 0.0).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert group_lasso(weight, BlockPattern(2, 1), 1e-5)[0, 0].item() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("kind", ["group_lasso", "group_lasso_gradient"])
def test_blocks_shrink_between_first_update_and_end_step(kind):
    """The callback against a loop over blocks; one block has no gradient, which the original turns into NaN."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 4, bias=False)
    plain, gradients = layer.weight.detach().clone(), torch.randn(6, 4, 2)
    gradients[:, :2, 1] = 0
    config = hc.WeightPruningConfig(
        pattern="2x1", target_sparsity=0.25, criterion="magnitude", sparsity_decay_type="linear", start_step=1,
        end_step=3, pruning_frequency=2, reg_type=kind, reg_coeff=0.05, op_names=[""],
    )  # fmt: skip
    optimizer, callback = torch.optim.SGD(layer.parameters(), lr=0.3), hc.WeightPruningCallback(config)
    state = SimpleNamespace(global_step=0, max_steps=6, num_train_epochs=1, log_history=[])
    everything = {"model": nn.Sequential(layer), "optimizer": optimizer}
    args = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=0.0)
    callback.on_train_begin(args, state, None, **everything)
    gone = torch.zeros(4, 2, dtype=torch.bool)
    for step, gradient in enumerate(gradients):
        state.global_step = step
        callback.on_step_begin(args, state, None, **everything)
        layer.weight.grad = gradient.clone()
        callback.on_pre_optimizer_step(args, state, None, **everything)
        optimizer.step()
        callback.on_optimizer_step(args, state, None, **everything)
        if step == 3:
            norms = {(top, left): float(plain[top : top + 2, left].abs().sum()) for top in (0, 2) for left in (0, 1)}
            top, left = min(norms, key=norms.get)
            gone[top : top + 2, left] = True
        plain -= 0.3 * gradient
        for top in (0, 2):
            for left in (0, 1):
                block, slope = plain[top : top + 2, left], float(gradient[top : top + 2, left].norm())
                if 1 <= step <= 3 and kind == "group_lasso":
                    block *= max(0.0, 1 - 0.3 * 0.05 * 2**0.5 / float(block.norm()))
                elif 1 <= step <= 3 and slope:
                    block *= max(0.0, 1 - 0.05 / slope)
        plain[gone] = 0
        assert torch.allclose(layer.weight, plain, atol=1e-6), step
    state.global_step = 6
    callback.on_train_end(args, state, None, **everything)
    assert int((layer.weight == 0).sum()) == 2


def test_layers_without_gradient_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = model[1].weight.detach().clone()
    config = hc.WeightPruningConfig(
        pattern="4x1", target_sparsity=0.5, criterion="snip", start_step=1, end_step=3, pruning_frequency=2,
        reg_type="group_lasso", reg_coeff=1.0, op_names=[""],
    )  # fmt: skip
    optimizer, callback = torch.optim.SGD(model.parameters(), lr=0.1), hc.WeightPruningCallback(config)
    state = SimpleNamespace(global_step=0, max_steps=5, num_train_epochs=1, log_history=[])
    everything = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(SimpleNamespace(gradient_accumulation_steps=1), state, None, **everything)
    for step in range(5):
        state.global_step = step
        callback.on_step_begin(None, state, None, **everything)
        model[0].weight.grad = torch.randn(4, 4)
        callback.on_pre_optimizer_step(None, state, None, **everything)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, **everything)
    assert torch.equal(model[1].weight, before)


def test_increments_come_with_an_optimizer_that_keeps_nothing():
    """Plain SGD has no state before the first zeros; the reference is the order of the magnitudes at the update."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    config = hc.WeightPruningConfig(
        pattern="1x1", target_sparsity=0.5, criterion="magnitude", sparsity_decay_type="oneshot", start_step=2,
        pruning_frequency=4, progressive=True, op_names=[""],
    )  # fmt: skip
    optimizer, callback = torch.optim.SGD(layer.parameters(), lr=0.1), hc.WeightPruningCallback(config)
    state = SimpleNamespace(global_step=0, max_steps=8, num_train_epochs=1, log_history=[])
    everything = {"model": nn.Sequential(layer), "optimizer": optimizer}
    callback.on_train_begin(SimpleNamespace(gradient_accumulation_steps=1), state, None, **everything)
    for step in range(8):
        state.global_step = step
        if step == 2:
            order = layer.weight.detach().abs().flatten().argsort()
        callback.on_step_begin(None, state, None, **everything)
        zero = set((layer.weight == 0).flatten().nonzero().flatten().tolist())
        assert zero == (set(order[: min(4 * (step - 1), 16)].tolist()) if step >= 2 else set())
        layer.weight.grad = torch.randn(4, 8)
        callback.on_pre_optimizer_step(None, state, None, **everything)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, **everything)
        optimizer.zero_grad()
