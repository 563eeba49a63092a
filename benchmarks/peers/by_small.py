"""A pretrained model of fewer layers, fine-tuned on the same sentences as the students."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.peers.setting import Setting


SETTINGS = "hf-compress finetune; embeddings frozen, as those of the dense model and of our students"
EXPORTED = True


def make(setting: Setting, folder: Path) -> PreTrainedModel:
    args = setting.args
    options = {
        "model_name_or_path": args.small, "data_dir": args.data_dir, "output_dir": folder / "model", "seed": args.seed,
        "max_length": args.max_length, "num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size, "bf16": args.bf16, "freeze_embeddings": True,
        "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "hf_compress", "finetune", *given], check=True)
    return setting.open(folder / "model")


def opened(setting: Setting, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    return setting.opened(folder / "model", model)
