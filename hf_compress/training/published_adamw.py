"""AdamW as the published code of ProKT has it (`compat="prokt"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class PublishedAdamW(Optimizer):
    """Adam with decoupled weight decay, in the order of transformers 2.9.

    It differs from `torch.optim.AdamW` twice: `eps` is added before the correction of the bias, so that at update t it
    is larger by 1 / sqrt(1 - beta2^t), and weights decay after the step, by the weights that came out.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Fraction of the weights, times the learning rate, that a step takes off.

    Source:
        ProKT specification 11 (arXiv 2107.09305); Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; parameters without gradients stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["exp_avg_sq"].sqrt().add_(group["eps"])
        corrected = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] * corrected)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
