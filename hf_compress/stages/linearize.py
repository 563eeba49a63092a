"""Turn a model's softmax attention into linear attention, and train the result under a changing teacher."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api import compress, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import count_cost, layer_macs
from hf_compress.core.devices import chosen_device
from hf_compress.core.positions import most_tokens
from hf_compress.core.saving import require_own_folder
from hf_compress.methods.linformer import LinformerConfig
from hf_compress.stages.finetune import (
    TeacherArguments,
    add_teacher_columns,
    model_folders,
    prepare,
    run,
    trainer_arguments,
)
from hf_compress.stages.models import (
    ModelArguments,
    fit_labels,
    has_head,
    lengthen_,
    open_model,
    open_pair,
    require_left_out,
    save_stage,
)
from hf_compress.tasks.sources import DataArguments, Task, load_task
from hf_compress.training.arguments import JointTeacherArguments, SnapshotTeacherArguments
from hf_compress.training.joint_teacher import JointTeacherTrainer
from hf_compress.training.snapshot_teacher import SnapshotTeacherTrainer


logger = logging.getLogger(__name__)


_MEASURED_TEXTS = 2000


@dataclass
class OutputArguments:
    """Where a converted model goes.

    Args:
        output_dir: Folder that receives the converted model, its tokenizer and `results.json`.
        device: Where it is computed: auto (the accelerator where there is one), cpu, or a device such as cuda.
    """

    output_dir: str
    device: str = "auto"


def linearize(
    model_args: ModelArguments, data: DataArguments, output: OutputArguments, config: LinformerConfig
) -> dict[str, Any]:
    """Convert a model to linear attention and save it, untrained.

    Args:
        model_args: A fine-tuned classifier (the start of target-guided and hybrid training) or a pretrained encoder
            (of unguided, trajectory- and waypoint-guided training), which gets a new head for the task.
        data: The task, whose texts are measured; only needed when the model has no head yet.
        output: Where it goes.
        config: What to make.

    Returns:
        The recorded step, the parameters before and after, the fraction of the dense arithmetic at some lengths, and
        under `texts` that on the task's own texts.

    Raises:
        ValueError: If the model cannot be opened or converted.
    """
    reads = "linearize reads the task's labels only"
    require_left_out(data, ("max_length",), f"{reads}; max_tokens says how long inputs may be")
    require_left_out(data, ("max_train_samples", "max_eval_samples"), reads)
    require_left_out(model_args, ("freeze_embeddings",), "linearize trains nothing")
    require_own_folder(output.output_dir, model_folders(model_args))
    named = data.task_name or data.data_dir or data.train_file or data.validation_file or data.test_file
    for name in ("text_column", "text_pair_column", "label_column"):
        if getattr(data, name) is not None and not named:
            raise ValueError(f"{name} is {getattr(data, name)!r}, but no task is named (task_name or data_dir).")
    torch.manual_seed(config.seed)
    task = load_task(data) if named else None
    tokenizer, model = open_pair(model_args, task, fresh_head=True)
    if task is not None:
        fit_labels(task, model, model_args.model_name_or_path)
    model.to(chosen_device(output.device))
    if not named and not has_head(model_args.model_name_or_path):
        logger.warning(
            "%s has no head: it gets one with %d labels. Name the task (task_name or data_dir) to size it.",
            model_args.model_name_or_path,
            model.config.num_labels,
        )
    before = count_cost(model, 1)
    dense_macs = {length: count_cost(model, length).macs for length in (128, 512, 2048)}
    lengths = _text_lengths(task, tokenizer, config.max_tokens or most_tokens(model)) if task else []
    dense_texts = _macs_of_texts(model, lengths)
    compress(model, config)
    step = steps_of(model)[-1]
    tokenizer.model_max_length = step["max_tokens"]
    macs = {length: count_cost(model, length).macs for length in dense_macs}
    results = {
        "step": step,
        "params": {"before": before.params, "after": count_cost(model, 1).params},
        "mac_ratio_by_length": {length: macs[length] / dense_macs[length] for length in macs},
    }
    if lengths:
        ratio = _macs_of_texts(model, lengths) / dense_texts
        median = statistics.median_low(lengths)
        results["texts"] = {"mac_ratio": ratio, "median_tokens": median, "longest_tokens": max(lengths)}
        if ratio >= 1:
            logger.warning(
                "Linear attention costs more than it saves on this task: its texts have %d tokens in the median and "
                "need %.2f times the dense arithmetic. projected_length=%d pays from about %d tokens on: take a lower "
                "one, or another method for short texts (prune-structure).",
                median, ratio, config.projected_length, 2 * config.projected_length,
            )  # fmt: skip
    save_stage(output.output_dir, model, tokenizer, results)
    return results


def _text_lengths(task: Task, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[int]:
    """Tokens of each text of the task, of a sample when there are many."""
    rows = task.splits["train"] if "train" in task.splits else next(iter(task.splits.values()))
    if len(rows) > _MEASURED_TEXTS:
        rows = rows.shuffle(seed=0).select(range(_MEASURED_TEXTS))
    texts = [rows[column][:] for column in task.text_columns]
    return [len(ids) for ids in tokenizer(*texts, truncation=longest is not None, max_length=longest)["input_ids"]]


def _macs_of_texts(model: PreTrainedModel, lengths: Sequence[int]) -> float:
    blocks = layers_of(model)
    counts = Counter(lengths)
    return sum(count * sum(layer_macs(block, length) for block in blocks) for length, count in counts.items())


def joint_distill(
    model_args: ModelArguments, teacher_args: TeacherArguments, data: DataArguments, args: JointTeacherArguments
) -> dict[str, Any]:
    """Train a student beside a teacher that is fine-tuned on the same batches (trajectory guided).

    Args:
        model_args: The student, e.g. a linearized pretrained encoder.
        teacher_args: The teacher before fine-tuning; when it has no head yet, it starts with the student's.
        data: The task.
        args: Losses, the teacher's learning rate and schedule, everything else about training.

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If student, teacher and data do not fit together, or a loss is not finite.
    """
    folders = model_folders(model_args, teacher_args.teacher_name_or_path)
    for written in (args.output_dir, f"{args.output_dir}/teacher"):
        require_own_folder(written, folders)
    task, tokenizer, student, rows = prepare(model_args, data, args.seed)
    common = trainer_arguments(task, student, tokenizer, args, rows)
    teacher = None
    if args.uses_teacher:
        teacher = open_model(teacher_args.teacher_name_or_path, task, fresh_head=True)
        _share_new_head_(teacher, student, teacher_args.teacher_name_or_path)
        longest, limit = most_tokens(student), most_tokens(teacher)
        if longest is not None and limit is not None and limit < longest:
            # It is fine-tuned here, so it learns the positions that it was not pretrained for.
            logger.info("The teacher's %d positions go on periodically up to %d.", limit, longest)
            lengthen_(teacher, longest)
        add_teacher_columns(common, task, data, teacher_args.teacher_name_or_path)
    return run(JointTeacherTrainer(teacher_model=teacher, **common), student, tokenizer, args)


def _share_new_head_(teacher: PreTrainedModel, student: PreTrainedModel, teacher_name: str) -> None:
    """Give a teacher the student's values where its own files have none: both set out from one head and pooler."""
    _, loaded = type(teacher).from_pretrained(teacher_name, config=teacher.config, output_loading_info=True)
    ours, theirs = teacher.state_dict(), student.state_dict()
    values = {
        name: theirs[name]
        for name in loaded["missing_keys"]
        if name in theirs and theirs[name].shape == ours[name].shape
    }
    if values:
        teacher.load_state_dict(values, strict=False)
        logger.info("The teacher starts with the student's head (%d tensors).", len(values))


def snapshot_distill(
    model_args: ModelArguments, data: DataArguments, args: SnapshotTeacherArguments
) -> dict[str, Any]:
    """Train a student on the saved states of a teacher's fine-tuning, one after the other (waypoint guided).

    Args:
        model_args: The student, e.g. a linearized pretrained encoder.
        data: The task.
        args: Losses, the ladder of teachers, everything else about training.

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If student, teachers and data do not fit together, or the loss is not finite.
    """
    snapshots = {f"teacher_snapshots ({folder})": folder for folder in args.teacher_snapshots}
    require_own_folder(args.output_dir, {**model_folders(model_args), **snapshots})
    task, tokenizer, student, rows = prepare(model_args, data, args.seed)
    common = trainer_arguments(task, student, tokenizer, args, rows)
    if args.uses_teacher:
        add_teacher_columns(common, task, data, args.teacher_snapshots[0])
    return run(SnapshotTeacherTrainer(**common), student, tokenizer, args)
