"""Group lasso against a minimiser that knows only its definition, and in a training against plain steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import hf_compress as hc
from hf_compress.methods.weight_pruning.patterns import Blocks
from hf_compress.methods.weight_pruning.regularizers import group_lasso


@pytest.mark.parametrize("strength", [0.05, 0.4, 3.0])
def test_a_proximal_step_minimises_what_defines_it(strength):
    """Each block alone: half the squared distance plus `strength sqrt(size)` times the norm."""
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = (weight * group_lasso(weight, Blocks(3, 2), strength)).numpy()
    for top in range(0, 6, 3):
        for left in range(0, 4, 2):
            start = weight[top : top + 3, left : left + 2].numpy().ravel()

            def cost(block, start=start):
                return 0.5 * ((block - start) ** 2).sum() + strength * 6**0.5 * np.linalg.norm(block)

            found = minimize(cost, start, method="Powell", options={"xtol": 1e-10, "ftol": 1e-14}).x
            block = ours[top : top + 3, left : left + 2].ravel()
            assert cost(block) <= cost(found) + 1e-9
            if strength < 3:
                assert np.abs(block - found).max() < 1e-3


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
