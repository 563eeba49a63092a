"""What a layer that drops tokens knows: the thresholds of its model and its own rule.

Letters: L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_compress.core.architectures import Block
from hf_compress.methods.token_pruning.importance import keep_rate_ramp, threshold_ramp


class TokenThresholds(nn.Module):
    """One absolute threshold a layer, a child of the base model.

    Args:
        initial: Their starting values.
        temperature: At the start.

    Attributes:
        values: [L] float32.
        weight: Scalar, lambda of the regulariser; what `ThresholdAnnealingCallback` steers. Trainers of this package
            add `weight * regularizer` to the loss in the soft stage.
        integral: Scalar, memory of that callback's controller.
        temperature: Of the soft stage at this moment; the callback anneals it.
        learning_rate: Of the thresholds, None: that of the weights.
        soft_fraction: Part of a training that belongs to the soft stage, set by `StageSwitchCallback`; None outside of
            trainings that switch.
    """

    def __init__(self, initial: list[float], temperature: float, **place: object) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(initial, dtype=torch.float32, **place))
        for name in ("weight", "integral"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, **place))
        self.learning_rate: float | None = None
        self.soft_fraction: float | None = None
        self.temperature = temperature


class TokenRule:
    """What one layer needs to know to prune; a plain attribute of the layer.

    Args:
        config: The model's config, whose flat fields are read at every forward pass.
        thresholds: Of the base model; None for `topk`.
        index: Of the layer.
        num_layers: L.
        reads_first: Whether the head reads nothing but the first token, so that the last layer need not compute
            the others, and padding must not stand there.
        finish: `(layer, context, residual) -> output rows`, what follows attention in this architecture.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        thresholds: TokenThresholds | None,
        index: int,
        num_layers: int,
        reads_first: bool,
        finish: Callable[[nn.Module, Tensor, Tensor], Tensor],
        block: Block,
    ) -> None:
        self.config = config
        self.thresholds = thresholds
        self.index = index
        self.last = index == num_layers - 1
        self.reads_first = reads_first
        self.finish = finish
        self.architecture = block.architecture
        self.head_size = block.head_size
        # A threshold that starts at zero belongs to a layer that never prunes, as published: no gradient moves it.
        ramp = threshold_ramp(1.0, num_layers, config.threshold_ramp)
        self.switched_off = config.prune_mode == "absolute_threshold" and ramp[index] == 0
        self.keep_rate = keep_rate_ramp(config.token_keep_rate, num_layers)[index]

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
        return self.thresholds.values[self.index]
