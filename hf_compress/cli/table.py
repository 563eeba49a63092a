"""The commands, as data: what each does, which dataclasses its flags fill, and which defaults it changes.

Nothing here imports what it names, so that help costs no more than reading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


_MODEL = {"Model": "hf_compress.stages.models.ModelArguments"}
_TEACHER = {"Teacher": "hf_compress.stages.finetune.TeacherArguments"}
_DATA = {"Data": "hf_compress.tasks.arguments.DataArguments"}
_DISTILLATION = {"Distillation": "hf_compress.training.arguments.DistillationArguments"}
_PLAIN_TRAINING = {"Training": "transformers.TrainingArguments"}

# What suits fine-tuning of an encoder better than the defaults of TrainingArguments.
_TRAINING = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 50,
    "report_to": "none",
}
# What stands in their place, where it is left out, beside `--compat`: the published codes' own.
PUBLISHED_TRAINING = {
    "cald": {"weight_decay": 0.0, "train_sampling_strategy": "random"},
    "ltp": {"weight_decay": 0.0, "train_sampling_strategy": "random", "warmup_steps": 0},
}
# The start that kept most accuracy (methods/linformer/README.md); the published one is LinformerConfig's own.
LINEAR_START = {"initialization": "pooling", "slot_mask": True, "length_scaling": False}


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        summary: Half a sentence for the list of commands.
        kinds: Topic to the dataclass whose fields are its flags, as `module.Class`, in the order in which help shows
            them and the command takes them.
        defaults: Values that replace the dataclasses' own defaults.
        note: What a person should know before the flags.
    """

    summary: str
    kinds: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


COMMANDS = {
    "demo": Command(
        "fine-tune, prune to half the arithmetic, recover, report, reload: offline, on real text",
        {"Demo": "hf_compress.stages.demo.DemoArguments", **_DATA},
    ),
    "finetune": Command(
        "train a classifier or regressor on a task", {**_MODEL, **_DATA, **_PLAIN_TRAINING}, _TRAINING
    ),
    "prune-structure": Command(
        "remove attention heads and neurons without retraining",
        {
            **_MODEL,
            "Pruning": "hf_compress.methods.structured_pruning.config.StructuredPruningConfig",
            "Calibration and output": "hf_compress.stages.prune_structure.CalibrationArguments",
            **_DATA,
        },
    ),
    "prune-tokens": Command(
        "learn which tokens can be dropped on the way through the layers",
        {
            **_MODEL,
            "Pruning": "hf_compress.stages.prune_tokens.TokenPruningArguments",
            **_DATA,
            **_PLAIN_TRAINING,
        },
        _TRAINING,
    ),
    "prune-weights": Command(
        "zeros in a pattern (N:M, blocks, channels): in training, with or without a teacher, or at once",
        {
            **_MODEL,
            "Pruning": "hf_compress.methods.weight_pruning.config.WeightPruningConfig",
            "Beside pruning": "hf_compress.stages.prune_weights.PruningArguments",
            **_DATA,
            **_DISTILLATION,
        },
        _TRAINING,
    ),
    "distill": Command(
        "teach a (compressed) student what a fine-tuned teacher knows",
        {**_MODEL, **_TEACHER, **_DATA, **_DISTILLATION},
        _TRAINING,
    ),
    "joint-distill": Command(
        "the same from a teacher that is fine-tuned at the same time",
        {**_MODEL, **_TEACHER, **_DATA, "Distillation": "hf_compress.training.arguments.JointTeacherArguments"},
        _TRAINING,
    ),
    "linearize": Command(
        "replace softmax attention by linear attention (Linformer)",
        {
            **_MODEL,
            "Linear attention": "hf_compress.methods.linformer.config.LinformerConfig",
            "Output": "hf_compress.stages.linearize.OutputArguments",
            **_DATA,
        },
        LINEAR_START,
        "The defaults are the start that kept most accuracy: 82 points, as the dense model, after training on short "
        "sentences, where the published random start (--initialization normal) reached 64. Linear attention saves "
        "arithmetic only on texts longer than about twice --projected_length; name the task to have them measured.",
    ),
    "snapshot-distill": Command(
        "the same as distill, from the saved states of a teacher's fine-tuning",
        {**_MODEL, **_DATA, "Distillation": "hf_compress.training.arguments.SnapshotTeacherArguments"},
        _TRAINING,
    ),
    "evaluate": Command(
        "metrics of saved models on a task",
        {"Evaluation": "hf_compress.stages.evaluate.EvaluateArguments", **_DATA},
    ),
    "report": Command(
        "dense against compressed: quality, size, arithmetic, measured latency",
        {"Report": "hf_compress.stages.evaluate.ReportArguments", **_DATA},
    ),
}
