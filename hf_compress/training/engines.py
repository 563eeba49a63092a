"""What accelerate runs a training with: whether it may is found out before the training begins."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_compress.core.engines import launched_with


def check_engine(trainer: Trainer) -> None:
    """Refuse what accelerate would leave out without a word, and the form of FSDP that hides the weights.

    Args:
        trainer: Its accelerator is made.

    Raises:
        ValueError: Says what to use.
    """
    device = trainer.args.device.type
    if trainer.args.fp16 and device == "cpu" and trainer.accelerator.scaler is None:
        raise ValueError(f"fp16 must be off on the {device}, where all of it would run in fp32: use bf16, or a GPU.")
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp or launched_with("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "fsdp must not be set here: accelerate shards models in processes with a GPU each, and would train "
                f"whole ones on this {device}. Drop it: torchrun alone trains with DDP."
            )
        return
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        raise ValueError(
            f"fsdp must be FSDP2, got version {version}, which flattens weights that methods look for by name. Set "
            "fsdp_config={'version': 2} (accelerate: fsdp_version: 2)."
        )


def refuse_learner_in_shards(accelerator: Accelerator) -> None:
    """Refuse a teacher that learns beside a student in shards.

    Raises:
        ValueError: Says what to use.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "A learning teacher must run without fsdp, which shards one trained model a process: the teacher is a "
            "second one. Drop fsdp (torchrun alone trains with DDP), or use a fixed teacher (DistillationTrainer)."
        )


def wrapping_of(accelerator: Accelerator) -> Callable[[nn.Module], nn.Module]:
    """How small modules beside a model are wrapped, so that processes average their gradients."""
    # Beside a model in shards each process has them whole; accelerate wraps nothing there without an optimizer.
    return DistributedDataParallel if getattr(accelerator, "is_fsdp2", False) else accelerator.prepare_model
