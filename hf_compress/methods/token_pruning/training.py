"""What training adds: the regulariser, the thresholds' optimizer group, measured arithmetic, stages.

Letters: B batch, S padded length, L layers, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import live_macs
from hf_compress.core.layers import LiveTokens
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.modeling import thresholds_of


def implied(config: PretrainedConfig) -> TokenPruningConfig | None:
    """The settings that somebody wrote into `config.json` by hand, as the published workflow does."""
    if getattr(config, "prune_mode", None) is None:
        return None
    values = {name: getattr(config, name) for name in TokenPruningConfig.flat if hasattr(config, name)}
    # transformers takes this name for a setting of text generation and refuses to save a config that has it.
    if "temperature" in config.__dict__:
        values["temperature"] = config.__dict__.pop("temperature")
    return TokenPruningConfig(**values)


def start_training(model: PreTrainedModel) -> None:
    """Freeze the thresholds in the hard stage and mark the stage in the config."""
    thresholds, config = thresholds_of(model), model.config
    # The mark in the config may be that of the training which the weights come from.
    switches = thresholds is not None and thresholds.soft_fraction is not None
    config.token_prune_stage = "switching" if switches else config.masking_mode
    if thresholds is not None:
        thresholds.values.requires_grad_(switches or config.masking_mode == "soft")


def check_resume(config: PretrainedConfig, checkpoint: PretrainedConfig) -> None:
    """Refuse to go on with the other stage's optimizer and step count.

    Raises:
        ValueError: If the checkpoint is of another stage.
    """
    stage = getattr(checkpoint, "token_prune_stage", None)
    # A run that switches by itself is in both stages: its callback knows which.
    if stage in (None, config.masking_mode, config.token_prune_stage):
        return
    found, remedy = f"one of the {stage} stage", "Open it"
    if stage == "switching":
        found = "one of a training that switches stages"
        remedy = "Construct a trainer with that training's StageSwitchCallback (--soft_fraction), or open it"
    raise ValueError(
        f"resume_from_checkpoint must be of the {config.masking_mode} stage, got {found}. {remedy} with "
        "from_pretrained and call train() without resume_from_checkpoint, into another output_dir."
    )


def regularizer(state: LiveTokens) -> Tensor:
    """Sum over layers of the mean soft mask of what counts: live tokens, and padding with `compat="ltp"`.

    Returns:
        Scalar: mean over examples of the mean over their tokens, summed over pruning layers.

    Source:
        LTP specification 5. The released code also averages over padding, which pushes early thresholds up.
    """
    means = []
    for mask, inside in state.soft.values():
        live = inside.to(mask.dtype)
        means.append(((mask * live).sum(1) / live.sum(1).clamp(min=1)).mean())
    return torch.stack(means).sum()


def loss_terms(model: PreTrainedModel, state: LiveTokens) -> dict[str, Tensor]:
    thresholds = thresholds_of(model)
    if thresholds is None or not state.soft:
        return {}
    return {"threshold": thresholds.weight * regularizer(state)}


def measures(model: PreTrainedModel, state: LiveTokens) -> dict[str, tuple[Tensor, Tensor]]:
    """Multiply-accumulates and kept tokens against those of the unpruned model on the same real lengths."""
    if not state.attended or state.soft:
        return {}
    blocks = layers_of(model, adapted=True)
    macs, dense = (by_layer.sum() for by_layer in live_macs(blocks, state))
    initial = state.attended[0].sum()
    kept = torch.stack([state.fed[block.index].sum() for block in blocks]).sum()
    return {"relative_macs": (macs, dense), "keep_rate": (kept, initial * len(blocks))}


def parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The thresholds: no weight decay, a learning rate of their own where one is set.

    With `compat="ltp"`, one norm clips their gradients and the weights'.
    """
    thresholds = thresholds_of(model)
    if thresholds is None or not thresholds.values.requires_grad:
        return []
    group: dict[str, Any] = {"params": [thresholds.values], "weight_decay": 0.0}
    if thresholds.published:
        group["clipped_together"] = True
    if thresholds.learning_rate is not None:
        group["lr"] = thresholds.learning_rate
    return [group]
