"""The config of a weight-pruned model, and of the schedule that prunes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_compress.core.expressions import check_expressions
from hf_compress.core.method import MethodConfig
from hf_compress.methods.weight_pruning.criteria import needs_gradients, needs_inputs
from hf_compress.methods.weight_pruning.patterns import BlockPattern, HeadPattern, NMPattern, Pattern, parse_pattern


NAME = "weight_pruning"
# Fields that describe the whole step, not one group of weights.
_WHOLE = ("local_configs", "achieved_sparsity", "heads_per_layer", "neurons_per_layer")
# Fields that only control a training. The record describes the model, so it leaves them out.
TRAINING_ONLY = (
    "sparsity_decay_type", "start_step", "end_step", "pruning_frequency", "warmup_epochs", "cooldown_epochs",
    "progressive", "reg_type", "reg_coeff",
)  # fmt: skip


def _with_lists(value: Any) -> Any:
    """A value as it comes back from JSON, which has no tuples."""
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _without_training(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TRAINING_ONLY}


@dataclass(kw_only=True)
class WeightPruningConfig(MethodConfig):
    """Weight pruning: zeros in ordinary weights, in a pattern, at exactly the requested sparsity.

    Args:
        pattern: Which weights become zero together, as one unit. `N:M`: N of every M neighbouring inputs are **zero**.
            `NxM`: blocks of N outputs and M inputs; `1x1` is unstructured. `Nxchannel`, `channelxN`: whole rows, whole
            columns. `mha`: attention heads, in all projections of an attention; their scores are averaged.
        target_sparsity: Fraction of the units to prune (of the weights for N:M, where it is at most N/M).
        criterion: How important a weight is: `magnitude` |W|, `gradient` |G|, `snip` |W G| of the last update,
            `snip_momentum` a decayed sum of it over all updates. Only at once, with calibration data (`compress`, or
            `--num_train_epochs 0`): `wanda` |W| times the norm of its input; `sparsegpt`, which also changes the
            weights that stay.
        scope: Which units compete. `global`: all units of the model in one ranking; `local`: those of each weight
            matrix, so that each matrix reaches the target.
        sparsity_decay_type: How sparsity grows in training; `oneshot`: at once, at `start_step`.
        start_step: Number of optimizer steps before the first pruning. Left out: `warmup_epochs`.
        end_step: Number of optimizer steps after which no more pruning starts. Left out: `cooldown_epochs` before
            training ends.
        pruning_frequency: Number of optimizer steps from one pruning update to the next.
        warmup_epochs: Epochs without pruning at the beginning, where `start_step` is left out.
        cooldown_epochs: Epochs with fixed zeros at the end, where `end_step` is left out.
        op_names: Regular expressions searched in module names: what is pruned. Left out: every layer.
        excluded_op_names: Regular expressions searched in module names: what is not pruned. Left out: when `op_names`
            is left out too, the task head, poolers and modules that share their weight with embeddings; otherwise
            nothing.
        pruning_op_types: Class names of modules that are pruned; subclasses count.
        min_sparsity_ratio_per_op: Smallest sparsity of each weight matrix, reached with the last pruning update.
        max_sparsity_ratio_per_op: Largest sparsity of each weight matrix.
        local_configs: One dict for each group of weights; its keys win over the fields above. Only weights that a
            dict selects are pruned; where two select the same weight, the first one owns it.
        progressive: Whether the zeros of a pruning update come in four increments, a quarter of `pruning_frequency`
            apart, the least important first; those of the last update come after `end_step` where that is given.
        reg_type: How blocks shrink from the first pruning update to `end_step`: `group_lasso` as a proximal step, by
            `learning rate * reg_coeff * sqrt(size)` of their norm; `group_lasso_gradient` as the original does, by
            the fraction `reg_coeff / norm of the gradient`.
        reg_coeff: How strongly `reg_type` shrinks; above 0 with a `reg_type`.
        criterion_reduce_type: How the scores of a unit's weights become one: `mean`, `sum` or `max`.
        achieved_sparsity: Filled in at the end: pruned units over all units (times N/M).
        heads_per_layer, neurons_per_layer: Filled in by `slim`: how many each layer keeps. Heads are counted as
            key-value heads.

    Source:
        Intel Neural Compressor 2.6 (removed there in 2026): patterns, criteria and schedules. Exact counts, ties and
        shapes that a pattern does not divide are described in the method's README. `wanda`: arXiv 2306.11695.
        `sparsegpt`: arXiv 2301.00774.

    Example:
        >>> WeightPruningConfig(pattern="2:4")
        Traceback (most recent call last):
            ...
        ValueError: target_sparsity must be at most 0.5 with pattern='2:4', got 0.9.
    """

    pattern: str = "4x1"
    target_sparsity: float = 0.9
    criterion: Literal["magnitude", "gradient", "snip", "snip_momentum", "wanda", "sparsegpt"] = "snip_momentum"
    scope: Literal["global", "local"] = "global"
    sparsity_decay_type: Literal["exp", "cos", "linear", "cube", "oneshot"] = "exp"
    start_step: int | None = None
    end_step: int | None = None
    pruning_frequency: int = 50
    warmup_epochs: float = 0
    cooldown_epochs: float = 0
    op_names: tuple[str, ...] | None = None
    excluded_op_names: tuple[str, ...] | None = None
    pruning_op_types: tuple[str, ...] = ("Linear",)
    min_sparsity_ratio_per_op: float = 0.0
    max_sparsity_ratio_per_op: float = 0.98
    local_configs: tuple[dict[str, Any], ...] = ()
    progressive: bool = False
    reg_type: Literal["group_lasso", "group_lasso_gradient"] | None = None
    reg_coeff: float = 0.0
    criterion_reduce_type: Literal["mean", "sum", "max"] = "mean"
    achieved_sparsity: float | None = field(default=None, metadata={"output": True})
    heads_per_layer: list[int] | None = field(default=None, metadata={"output": True})
    neurons_per_layer: list[int] | None = field(default=None, metadata={"output": True})

    def __post_init__(self) -> None:
        for name in ("op_names", "excluded_op_names", "pruning_op_types", "local_configs"):
            # JSON, YAML and the command line know lists only.
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def check(self) -> None:
        _check_sizes(self)
        _check_names(self)
        if self.local_configs:
            # Each dict replaces some of the fields: only the merged configs have to be possible.
            self.resolved()
            return
        _check_amount(self)
        _check_reconstruction(self)
        _check_window(self)
        _check_training(self)

    def resolved(self) -> list[WeightPruningConfig]:
        """One config for each group of weights, with the keys of its local config merged in.

        Raises:
            ValueError: If a local config has an unknown key or is impossible.
        """
        if not self.local_configs:
            return [self]
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _WHOLE}
        configs = []
        for index, local in enumerate(self.local_configs):
            for key in local:
                if key not in shared:
                    raise ValueError(f"local_configs[{index}] must hold keys of {', '.join(shared)}, got {key!r}.")
            try:
                configs.append(type(self)(**{**shared, **local}))
            except ValueError as error:
                raise ValueError(f"local_configs[{index}]: {error}") from error
        return configs

    @property
    def parsed_pattern(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def prunes_channels(self) -> bool:
        """Whether a pattern prunes whole rows, columns or heads, which `slim` can cut out."""
        patterns = [entry.parsed_pattern for entry in self.resolved()]
        return any(
            isinstance(pattern, HeadPattern)
            or (isinstance(pattern, BlockPattern) and None in (pattern.rows, pattern.columns))
            for pattern in patterns
        )

    @property
    def needs_gradients(self) -> bool:
        return needs_gradients(self.criterion)

    @property
    def needs_inputs(self) -> bool:
        return needs_inputs(self.criterion)

    def to_record(self) -> dict[str, Any]:
        """What the model is, without the settings that only steered its training."""
        record = _without_training(super().to_record())
        record["local_configs"] = [_without_training(local) for local in self.local_configs]
        return {name: _with_lists(value) for name, value in record.items()}


def _check_sizes(config: WeightPruningConfig) -> None:
    if (config.heads_per_layer is None) != (config.neurons_per_layer is None):
        raise ValueError("heads_per_layer and neurons_per_layer must be given together, got one of them.")
    for name in ("heads_per_layer", "neurons_per_layer"):
        sizes = getattr(config, name)
        if sizes is not None and min(sizes, default=-1) < 0:
            raise ValueError(f"{name} must hold a size of at least 0 for each layer, got {sizes}.")


def _check_names(config: WeightPruningConfig) -> None:
    for name in ("op_names", "excluded_op_names"):
        check_expressions(name, getattr(config, name) or ())
    if not config.pruning_op_types:
        raise ValueError("pruning_op_types must name at least one class, got none.")


def _check_amount(config: WeightPruningConfig) -> None:
    pattern = parse_pattern(config.pattern)
    if not 0 <= config.target_sparsity < 1:
        raise ValueError(f"target_sparsity must be in [0, 1), got {config.target_sparsity}.")
    if isinstance(pattern, NMPattern) and config.target_sparsity > pattern.ceiling + 1e-9:
        raise ValueError(
            f"target_sparsity must be at most {pattern.ceiling:g} with pattern={config.pattern!r}, "
            f"got {config.target_sparsity}."
        )
    low, high = config.min_sparsity_ratio_per_op, config.max_sparsity_ratio_per_op
    if not 0 <= high < 1:
        raise ValueError(f"max_sparsity_ratio_per_op must be in [0, 1), got {high}.")
    if not 0 <= low <= config.target_sparsity:
        raise ValueError(
            f"min_sparsity_ratio_per_op must be in [0, target_sparsity={config.target_sparsity}], got {low}."
        )
    if config.target_sparsity > high:
        raise ValueError(
            f"target_sparsity must be at most max_sparsity_ratio_per_op={high}, got {config.target_sparsity}."
        )


def _check_reconstruction(config: WeightPruningConfig) -> None:
    if config.criterion != "sparsegpt":
        return
    pattern = config.parsed_pattern
    # In each row of W, the remaining weights compensate for the pruned ones, one column after the other.
    if not isinstance(pattern, NMPattern) and getattr(pattern, "columns", None) != 1:
        raise ValueError(f"pattern must be 'N:M' or 'Nx1' with criterion='sparsegpt', got {config.pattern!r}.")
    if config.scope != "local":
        raise ValueError(
            f"scope must be 'local' with criterion='sparsegpt' (it treats one weight after the other), "
            f"got {config.scope!r}."
        )


def _check_window(config: WeightPruningConfig) -> None:
    if config.pruning_frequency < 1:
        raise ValueError(f"pruning_frequency must be at least 1, got {config.pruning_frequency}.")
    for name in ("start_step", "end_step", "warmup_epochs", "cooldown_epochs"):
        if getattr(config, name) is not None and getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}.")
    if config.end_step is not None and config.end_step < (config.start_step or 0):
        raise ValueError(f"end_step must be at least start_step={config.start_step or 0}, got {config.end_step}.")


def _check_training(config: WeightPruningConfig) -> None:
    if config.progressive and config.pruning_frequency < 4:
        raise ValueError(
            f"pruning_frequency must be at least 4 with progressive=True, got {config.pruning_frequency}: "
            "the zeros of a pruning update come in four increments."
        )
    if config.progressive and isinstance(config.parsed_pattern, HeadPattern):
        raise ValueError("pattern must not be 'mha' with progressive=True: a head is pruned in one go.")
    if config.needs_inputs and (config.progressive or config.reg_type is not None):
        raise ValueError(
            f"progressive and reg_type must be left out with criterion={config.criterion!r}, which prunes at once."
        )
    if config.reg_type is not None and config.sparsity_decay_type == "oneshot":
        raise ValueError("sparsity_decay_type must be gradual with reg_type, got 'oneshot': nothing would shrink.")
    if config.reg_coeff < 0 or (config.reg_coeff > 0) != (config.reg_type is not None):
        raise ValueError(
            f"reg_coeff must be positive with a reg_type and 0 without, got {config.reg_coeff} with {config.reg_type}."
        )
    if config.reg_type is not None and not isinstance(config.parsed_pattern, BlockPattern):
        raise ValueError(f"pattern must be one of blocks or channels with reg_type, got {config.pattern!r}.")
