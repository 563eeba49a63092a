"""What a layer that drops tokens knows: the thresholds of its model and its own rule.

Letters: L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_compress.core.architectures import TransformerLayer
from hf_compress.methods.token_pruning.importance import keep_rate_ramp, threshold_ramp


class TokenThresholds(nn.Module):
    """One absolute threshold a layer, a child of the base model.

    Args:
        initial: Their starting values, rounded to single precision as in the released code.
        temperature: At the start.
        dtype: float32, or float64 in a model of double precision.
        published: Whether training follows the released code: padding in the regulariser, one norm for clipping.

    Attributes:
        values: [L].
        weight: Scalar, lambda of the regulariser; what `ThresholdAnnealingCallback` steers. Trainers of this package
            add `weight * regularizer` to the loss in the soft stage.
        integral: Scalar, memory of that callback's controller.
        temperature: Of the soft stage at this moment; the callback anneals it.
        learning_rate: Of the thresholds, None: that of the weights.
        soft_fraction: Part of a training that belongs to the soft stage, set by `StageSwitchCallback`; None outside of
            trainings that switch.
    """

    def __init__(
        self,
        initial: list[float],
        temperature: float,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        published: bool = False,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(initial, dtype=torch.float32, device=device).to(dtype))
        for name in ("weight", "integral"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device))
        self.learning_rate: float | None = None
        self.soft_fraction: float | None = None
        self.temperature = temperature
        self.published = published


@functools.cache
def _keep_rates(rate: float, num_layers: int) -> tuple[float, ...]:
    return tuple(keep_rate_ramp(rate, num_layers))


class TokenRule:
    """What one layer needs to know to prune; a plain attribute of the layer.

    Args:
        config: The model's config, whose flat fields are read at every forward pass; only those that made the
            thresholds (`final_token_threshold`, `threshold_ramp`) have had their effect.
        thresholds: Of the base model; None for `topk`.
        index: Of the layer.
        num_layers: L.
        reads_first: Whether the head reads nothing but the first token, so that the last layer need not compute
            the others, and padding must not stand there.
        finish: `(layer, context, residual) -> output rows`, what follows attention in this architecture.
        block: The layer.
        published: Whether the first token is dropped like any other, as in the released code.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        thresholds: TokenThresholds | None,
        index: int,
        num_layers: int,
        reads_first: bool,
        finish: Callable[[nn.Module, Tensor, Tensor], Tensor],
        block: TransformerLayer,
        published: bool = False,
    ) -> None:
        self.config = config
        self.thresholds = thresholds
        self.index = index
        self.num_layers = num_layers
        self.last = index == num_layers - 1
        self.reads_first = reads_first
        self.published = published
        self.finish = finish
        self.architecture = block.architecture
        self.head_size = block.head_size
        # A threshold that starts at zero belongs to a layer that never prunes, as published: no gradient moves it.
        ramp = threshold_ramp(1.0, num_layers, config.threshold_ramp)
        self.switched_off = config.prune_mode == "absolute_threshold" and ramp[index] == 0

    @property
    def keep_rate(self) -> float:
        return _keep_rates(vars(self.config)["token_keep_rate"], self.num_layers)[self.index]

    @property
    def norm(self) -> str:
        # Straight from the dict: attributes of configs are looked up through several layers of Python.
        fields = vars(self.config)
        return "live" if fields["scoring_mode"] == "mean_norm" else fields["score_norm"]

    def prunes(self) -> bool:
        """Whether this layer looks at scores at all."""
        if vars(self.config)["prune_mode"] == "topk":
            return self.keep_rate < 1
        return not self.switched_off

    def threshold(self) -> Tensor:
        if self.thresholds is None:
            raise ValueError(
                "prune_mode='absolute_threshold' needs thresholds, and this model has none: it was made with "
                "prune_mode='topk'. Compress the dense model with prune_mode='absolute_threshold'."
            )
        return self.thresholds.values[self.index]
