"""Measures the arithmetic that thresholds leave, and scales thresholds to a target for it."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from scipy.optimize import brentq
from transformers import PreTrainedModel

from hf_compress.core.batches import base_inputs
from hf_compress.core.forward_state import FORWARD_STATE
from hf_compress.core.modes import evaluating
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.measures import relative_cost
from hf_compress.methods.token_pruning.modeling import required_thresholds


logger = logging.getLogger(__name__)

_LARGEST_FACTOR = 64.0


@torch.no_grad()
def relative_macs(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    """Measure the fraction of the multiply-accumulates that remains when tokens are really dropped from a batch.

    Args:
        model: Has token pruning; its mode is restored.
        batch: Model inputs; labels are ignored.
    """
    state = LiveTokens(whole=True)
    with evaluating(model):
        model.base_model(**base_inputs(model, batch), **{FORWARD_STATE: state})
    macs, dense = relative_cost(model, state)["relative_macs"]
    return float(macs) / float(dense)


@torch.no_grad()
def scale_thresholds(
    model: PreTrainedModel,
    batch: dict[str, Any],
    target: float,
    tolerance: float = 0.01,
    measured: float | None = None,
) -> float:
    """Multiply all thresholds by one factor, so that dropping tokens leaves a target fraction of the arithmetic.

    The learned ratios between the thresholds of the layers stay. Thresholds that are close enough are not changed.

    Args:
        model: Has thresholds.
        batch: Model inputs to measure on.
        target: Target for the relative multiply-accumulates, in (0, 1].
        tolerance: Distance from the target that is close enough.
        measured: Result of `relative_macs` for the model as it is; None: it is computed.

    Returns:
        The factor; 1.0 if nothing was changed.
    """
    now = (relative_macs(model, batch) if measured is None else measured) - target
    if abs(now) <= tolerance:
        return 1.0
    values = required_thresholds(model, "scale_thresholds").values
    learned = values.detach().clone()

    def distance(log_factor: float) -> float:
        values.copy_(learned * math.exp(log_factor))
        found = relative_macs(model, batch) - target
        return 0.0 if abs(found) <= tolerance else found

    step = math.copysign(0.1, now)  # Higher thresholds leave less.
    near, far = 0.0, step
    while (there := distance(far)) * now > 0:
        near, step = far, 2 * step
        far += step
        if abs(far) > math.log(_LARGEST_FACTOR):
            values.copy_(learned)
            logger.warning(
                "No factor on the thresholds leaves %.3f of the arithmetic (now %.3f); they are not changed.",
                target,
                now + target,
            )
            return 1.0
    # The arithmetic is a step function of the factor: the root finder may stop at a step larger than the tolerance.
    root = brentq(distance, near, far, xtol=1e-3, maxiter=20, disp=False) if there else far
    values.copy_(learned * math.exp(root))
    return math.exp(root)
