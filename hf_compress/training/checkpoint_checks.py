"""Whether a training can go on from a checkpoint: found out before anything is read into the model or its optimizer.

`Trainer` has no public hook around the reading of a checkpoint, and its errors do not say which file they are about.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME

from hf_compress.core.weight_files import require_fit
from hf_compress.training.checkpoints import binary_files, intact, missing_part, readable, require_same_processes


_OPTIMIZER = "optimizer and schedule"
# Files of `Trainer` in the words of an error.
_PARTS = {OPTIMIZER_NAME: _OPTIMIZER, SCHEDULER_NAME: _OPTIMIZER, SCALER_NAME: "loss scale"}
_RANDOM = "random numbers"


def require_complete(checkpoint: Path, num_processes: int = 1) -> None:
    """Refuse a checkpoint that lacks a file.

    Args:
        checkpoint: Its folder.
        num_processes: Number of processes of the resumed training; each reads its own random state.

    Raises:
        ValueError: If this is no checkpoint, one of another number of processes, or a file of it is missing.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"resume_from_checkpoint must be true or a checkpoint folder, got {str(checkpoint)!r}.")
    require_same_processes(checkpoint, num_processes)
    reason = missing_part(checkpoint, num_processes)
    # The reader of an inner folder reports what it lacks.
    if reason is not None and "/" not in reason:
        raise ValueError(
            f"resume_from_checkpoint {str(checkpoint)!r} cannot be read: {reason}. Name another checkpoint, or true "
            "for the last one that is whole."
        )


def require_readable(checkpoint: Path, process: int, num_processes: int) -> None:
    """Refuse a checkpoint whose files are missing, damaged, or hold something else than their names say.

    Args:
        checkpoint: Its folder.
        process: The number of this process.
        num_processes: Number of processes of the resumed training.

    Raises:
        ValueError: Names the part that cannot be read.
    """
    require_complete(checkpoint, num_processes)
    for name in binary_files(checkpoint):
        # Those of engines and of teachers lie in folders of their own, and have readers of their own.
        if "/" not in name and name.endswith(".safetensors") and name.startswith(("model", "adapter")):
            with readable(checkpoint, "weights"):
                _require_intact(checkpoint / name)
    for name in _PARTS:
        saved_state(checkpoint, name)
    states = random_states_of(checkpoint, process, num_processes)
    if states is not None:
        with readable(checkpoint, _RANDOM):
            random.Random().setstate(states["python"])
            np.random.RandomState().set_state(states["numpy"])
            torch.Generator().set_state(states["cpu"])


def _require_intact(file: Path) -> None:
    if not intact(file):
        raise ValueError(f"{file.name} is damaged.")


def saved_state(checkpoint: Path, name: str) -> Mapping[str, Any] | None:
    """Open a file that `Trainer` wrote, without reading its tensors yet; None if there is no such file.

    Raises:
        ValueError: If it cannot be read, or holds no names and values.
    """
    file = checkpoint / name
    if not file.is_file():
        return None
    with readable(checkpoint, _PARTS[name]):
        _require_intact(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} holds a {type(found).__name__}, not the state of a training.")
    return found


def random_states_of(checkpoint: Path, process: int, num_processes: int) -> Mapping[str, Any] | None:
    """The random numbers' states that `Trainer` will set; None where the checkpoint has none for this process.

    Raises:
        ValueError: If they cannot be read.
    """
    file = checkpoint / ("rng_state.pth" if num_processes == 1 else f"rng_state_{process}.pth")
    if not file.is_file():
        return None
    with readable(checkpoint, _RANDOM), cast(Any, safe_globals)():
        found = torch.load(file, weights_only=True)
        if not isinstance(found, Mapping):
            raise ValueError(f"{file.name} holds a {type(found).__name__}, not random states by name.")
    return found


def saved_config(checkpoint: Path) -> PretrainedConfig | None:
    """The config of a checkpoint's model; None where only adapters are saved.

    Raises:
        ValueError: If it cannot be read.
    """
    if not (checkpoint / CONFIG_NAME).is_file():
        return None
    with readable(checkpoint, CONFIG_NAME):
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint)
    return config


def require_fitting_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Refuse weights of a model of another size or kind.

    Raises:
        ValueError: Names the first tensor that does not fit.
    """
    with readable(checkpoint, "weights"):
        files = checkpoint.glob("model*.safetensors")
        require_fit(files, model.state_dict(keep_vars=True), getattr(model, "base_model_prefix", ""))


def require_fitting_optimizer(checkpoint: Path, optimizer: Optimizer | AcceleratedOptimizer) -> None:
    """Refuse the optimizer of a training that trained other parameters.

    Raises:
        ValueError: If it has other groups, or groups of other sizes.
    """
    state = saved_state(checkpoint, OPTIMIZER_NAME)
    if state is None:
        return
    with readable(checkpoint, _OPTIMIZER):
        saved = [len(group["params"]) for group in state["param_groups"]]
        ours = [len(group["params"]) for group in optimizer.param_groups]
        if saved != ours:
            raise ValueError(f"it trains groups of {saved} parameters, this training groups of {ours}.")
