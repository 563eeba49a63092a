"""The thresholds of a model that drops tokens, and the rule of each of its layers.

Letters: L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_compress.core.architectures import TransformerLayer
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.importance import keep_rate_ramp, threshold_ramp


if TYPE_CHECKING:
    from hf_compress.methods.token_pruning.training import TokenPruningTraining


class TokenThresholds(nn.Module):
    """One absolute threshold for each layer; a child of the base model.

    Args:
        initial: Their starting values, rounded to single precision as in the released code.
        temperature: Initial temperature.
        dtype: float32, or float64 in a model of double precision.
        published: Whether training follows the released code: padding in the regulariser, one norm for clipping.

    Attributes:
        values: [L].
        weight: Scalar, lambda of the regulariser; `ThresholdAnnealingCallback` controls it. Trainers of this package
            add `weight * regularizer` to the loss in the soft phase.
        integral: Scalar, the integral of that callback's controller.
        temperature: Current temperature of the soft phase; the callback anneals it.
        session: The training that is running or was prepared last; None before the first one.
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
        self.weight: Tensor
        self.integral: Tensor
        self.values = nn.Parameter(torch.tensor(initial, dtype=torch.float32, device=device).to(dtype))
        for name in ("weight", "integral"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device))
        self.session: TokenPruningTraining | None = None
        self.temperature = temperature
        self.published = published


@functools.cache
def _keep_rates(rate: float, num_layers: int) -> tuple[float, ...]:
    return tuple(keep_rate_ramp(rate, num_layers))


class TokenRule:
    """The rule by which one layer drops tokens; a plain attribute of its module.

    Args:
        config: Config of the step. Only settings that cannot change after the layer is made are read from it; the
            others are fields of the model's config, read in every forward pass.
        thresholds: The thresholds of the base model; None for `topk`.
        layer: The layer that drops tokens.
        num_layers: L.
        reads_first: Whether the head reads only the first token. The last layer then need not compute the others, and
            the first position must not be padding.
        finish: `(layer module, context, residual) -> output rows`: the part of the layer after attention.

    Attributes:
        published: Whether the first token is dropped like any other, as in the released code.
    """

    def __init__(
        self,
        config: TokenPruningConfig,
        thresholds: TokenThresholds | None,
        layer: TransformerLayer,
        num_layers: int,
        reads_first: bool,
        finish: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ) -> None:
        self.thresholds = thresholds
        self.index = layer.index
        self.num_layers = num_layers
        self.last = layer.index == num_layers - 1
        self.reads_first = reads_first
        self.published = config.compat == "ltp"
        self.finish = finish
        self.architecture = layer.architecture
        self.head_size = layer.head_size
        self._attention: Any = layer.attention
        # A threshold that starts at zero belongs to a layer that never prunes, as published, so it has no gradient.
        ramp = threshold_ramp(1.0, num_layers, config.threshold_ramp)
        self.switched_off = config.prune_mode == "absolute_threshold" and ramp[layer.index] == 0

    @property
    def config(self) -> PretrainedConfig:
        """The model's config, through the module of the layer that holds it."""
        config: PretrainedConfig = self._attention.config
        return config

    @property
    def keep_rate(self) -> float:
        # Straight from the dict: attributes of configs are looked up through several layers of Python.
        return _keep_rates(vars(self.config)["token_keep_rate"], self.num_layers)[self.index]

    @property
    def norm(self) -> Literal["reference", "live", "initial"]:
        fields = vars(self.config)
        return "live" if fields["scoring_mode"] == "mean_norm" else fields["score_norm"]

    def prunes(self) -> bool:
        """Whether this layer reads scores at all."""
        if vars(self.config)["prune_mode"] == "topk":
            return self.keep_rate < 1
        return not self.switched_off

    @property
    def temperature(self) -> float:
        """The temperature of the soft phase."""
        assert self.thresholds is not None
        return self.thresholds.temperature

    def threshold(self) -> Tensor:
        """The scalar that the scores of this layer are compared with.

        Raises:
            ValueError: If the model was made without thresholds.
        """
        if self.thresholds is None:
            raise ValueError(
                "prune_mode='absolute_threshold' needs thresholds, and this model has none: it was made with "
                "prune_mode='topk'. Compress the dense model with prune_mode='absolute_threshold'."
            )
        return self.thresholds.values[self.index]
