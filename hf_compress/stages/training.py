"""What the stages that train share: inputs that fit together, a teacher's own inputs, training and saving."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from hf_compress.core.engines import launched_with
from hf_compress.core.launcher import lost_process_named
from hf_compress.core.positions import most_tokens
from hf_compress.report.quality import TaskEvaluation, training_metrics
from hf_compress.stages.models import ModelArguments, fit_labels, head_config, task_for
from hf_compress.stages.processors import check_vocabulary, has_tokenizer, open_tokenizer
from hf_compress.stages.saved import save_stage
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.inputs import row_lengths
from hf_compress.tasks.pair_inputs import reads_separately
from hf_compress.tasks.sources import load_task
from hf_compress.tasks.task import EVALUATED, Processor, Task
from hf_compress.training.collator import TEACHER_PREFIX, TeacherStudentCollator
from hf_compress.training.trainer import CompressionTrainer


logger = logging.getLogger(__name__)

# Arguments that say how much a student listens to whom.
_LOSSES = (
    "alpha_task",
    "alpha_output",
    "alpha_layer",
    "alpha_similarity",
    "temperature",
    "proximal_weight",
    "student_ce_weight",
)


def _splits(task: Task, processor: Processor, data: DataArguments) -> dict[str, Dataset]:
    train = task.encode("train", processor, data.longest)
    rows = {"train": train.add_column("length", row_lengths(train))}
    if task.evaluation_split is not None:
        rows["evaluation"] = task.encode(task.evaluation_split, processor, data.longest)
    return rows


def prepare(
    model_args: ModelArguments, data: DataArguments, seed: int, trains: bool = True, teacher: str | None = None
) -> tuple[Task, Processor, PreTrainedModel, dict[str, Dataset]]:
    """Task, tokenizer (or image processor), model and encoded splits that fit together.

    Args:
        model_args, data: Where they are.
        seed: Of a new head.
        trains: Whether the model is trained: then it may get a new head, and the task's label names.
        teacher: Hub name or folder of the model that teaches. It decides the kind of task where the columns fit
            several, and a new head takes its labels.

    Returns:
        The task has the model's label ids.

    Raises:
        ValueError: If they do not fit together.
    """
    task = task_for(teacher or model_args.describing(), data)
    if trains and teacher is None and not task.has_own_loss:
        # A sentence encoder may be about to learn classes.
        task = _with_own_loss(load_task(data))
    task.require_trainable()
    without_head = model_args.head_config(task) is None
    taught = head_config(teacher, task) if teacher and without_head else None
    if taught is not None:
        task = task.matched(taught)
    set_seed(seed)
    processor, model = model_args.open(task, fresh_head=trains)
    task = fit_labels(task, model, model_args.model_name_or_path)
    if trains:
        model.config.update(task.names_for(model.config))
    if task.evaluation_split is None:
        reasons = [task.unmeasurable(split) for split in EVALUATED if split in task.splits]
        reason = reasons[0] if reasons else "The task has neither a validation nor a test split."
        logger.warning("Nothing is measured. %s", reason)
    else:
        logger.info("Models are measured on the %s split.", task.evaluation_split)
    model_args.prepare_(model)
    rows = _splits(task, processor, data)
    longest = max(max(row_lengths(split)) for split in rows.values())
    require_positions(longest, most_tokens(model), data.longest)
    return task, processor, model, rows


def require_positions(longest: int, limit: int | None, max_length: int) -> None:
    """Raise `ValueError` if the longest input has more tokens than a model has positions; None: it has no limit."""
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length must be at most the model's {limit} positions, got {max_length} and examples of {longest} "
            "tokens. Or give it more (max_positions)."
        )


def _with_own_loss(task: Task) -> Task:
    if task.has_own_loss:
        return task
    raise ValueError(
        f"{task.kind} has no loss of its own: let a teacher teach it (distill --alpha_task 0), or say what else is to "
        "be learned (task_kind)."
    )


def trainer_arguments(
    task: Task,
    model: PreTrainedModel,
    processor: Processor,
    args: TrainingArguments,
    rows: dict[str, Dataset],
) -> dict[str, Any]:
    """What every trainer takes; all but `args` comes from `prepare`.

    Raises:
        ValueError: If the losses in `args` do not exist for the task, or a model would be trained in shards.
    """
    if args.fsdp or launched_with("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "fsdp must not be set for a command, whose first process alone saves the model: shard in a script with "
            "one of our trainers (save_model gathers the shards), or leave it out (torchrun alone trains with DDP)."
        )
    if not task.has_own_loss and getattr(args, "alpha_task", True):
        raise ValueError(
            f"alpha_task must be 0 for {task.kind} without labels to learn: a teacher teaches its vectors or scores "
            "(alpha_output), how alike sentences are (alpha_similarity) and hidden states (alpha_layer)."
        )
    if task.evaluation_split is None and args.eval_strategy != "no":
        asked = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"eval_strategy must be 'no': the data have no split to measure on, got {asked!r}.")
    callbacks = []
    if not task.judged_in_training:
        # Its outputs are of no use to the trainer, and large.
        args.prediction_loss_only = True
        if task.evaluation_split is not None:
            callbacks = [TaskEvaluation(task, task.evaluation_split, rows["evaluation"], processor)]
    return {
        "model": model,
        "args": args,
        "train_dataset": rows["train"],
        "eval_dataset": rows.get("evaluation"),
        "data_collator": task.collator(processor),
        "processing_class": processor,
        "callbacks": callbacks,
        **training_metrics(task),
    }


def run_training(
    trainer: CompressionTrainer,
    task: Task,
    model: PreTrainedModel,
    processor: Processor,
    args: TrainingArguments,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Train (or go on training), evaluate, save; returns the results that were written.

    With the name of a teacher, they tell of it and of the weights of the losses, and so does the README.md.
    """
    wanted = str(args.resume_from_checkpoint or "no")
    # `Trainer` takes these words for names of folders.
    words = {"true": True, "1": True, "yes": True, "false": None, "0": None, "no": None}
    outcome = trainer.train(resume_from_checkpoint=words.get(wanted.lower(), wanted))
    seconds, loss = outcome.metrics["train_runtime"], outcome.metrics["train_loss"]
    results = {"train_seconds": seconds, "train_loss": loss, **evaluation_results(trainer, task)}
    if teacher is not None:
        # The card goes to others, whom folders of this machine do not concern.
        named = Path(teacher).name if Path(teacher).is_dir() else teacher
        losses = {name: getattr(args, name) for name in _LOSSES if hasattr(args, name)}
        if not losses.get("alpha_similarity"):
            # Of sentence encoders alone.
            losses.pop("alpha_similarity", None)
        results["training"] = {"trainer": type(trainer).__name__, "settings": {"teacher": named, **losses}}
    if trainer.is_world_process_zero():
        save_stage(str(args.output_dir), model, processor, results, task)
    # What comes next in another process may open what was saved, as a teacher that was fine-tuned for its student.
    with lost_process_named(args.world_size):
        trainer.accelerator.wait_for_everyone()
    return results


def evaluation_results(trainer: CompressionTrainer, task: Task) -> dict[str, Any]:
    """The metrics of the evaluation split, its name, and the class that F1 is of; nothing where there is no split."""
    rows = trainer.eval_dataset
    if not isinstance(rows, Dataset):
        return {}
    found: dict[str, Any] = {**trainer.evaluate(), "eval_split": str(rows.split)}
    if task.positive_class is not None:
        found["positive_class"] = task.positive_class
    return found


def add_teacher_columns(common: dict[str, Any], task: Task, data: DataArguments, teacher_name: str) -> None:
    """Encode every example a second time for a teacher that reads other tokens; otherwise change nothing.

    It has another tokenizer, or reads pairs as one sequence where the student reads the texts one by one.

    A folder without tokenizer (plain `save_pretrained`) holds a teacher that reads the student's tokens.

    Args:
        common: What `trainer_arguments` made; datasets and collator are replaced in it.
        task, data: Where the texts are.
        teacher_name: Hub name or folder of the teacher and its tokenizer.

    Raises:
        ValueError: If that tokenizer belongs to another model, or is missing where it is needed.
    """
    separate = isinstance(common["processing_class"], PreTrainedTokenizerBase) and reads_separately(
        common["processing_class"]
    )
    if not has_tokenizer(teacher_name):
        if separate:
            raise ValueError(
                f"No tokenizer can be opened at {teacher_name!r}: the teacher reads pairs as one sequence, which the "
                "student's tokenizer does not encode. Save the teacher's tokenizer there."
            )
        logger.info("%s has no tokenizer: it reads the student's tokens.", teacher_name)
        return
    tokenizer = open_tokenizer(teacher_name)
    check_vocabulary(AutoConfig.from_pretrained(teacher_name), tokenizer)
    if not separate and tokenizer.get_vocab() == common["processing_class"].get_vocab():
        return
    common["data_collator"] = TeacherStudentCollator(common["data_collator"], DataCollatorWithPadding(tokenizer))
    for name, column in (("train", "train_dataset"), (task.evaluation_split, "eval_dataset")):
        if name is not None and common[column] is not None:
            common[column] = _with_teacher_columns(name, common[column], task, tokenizer, data)


def _with_teacher_columns(
    name: str, rows: Any, task: Task, tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> Any:
    encoded = task.teacher_columns(name, tokenizer, data.longest)
    for column in encoded.column_names:
        rows = rows.add_column(f"{TEACHER_PREFIX}{column}", encoded[column][:])
    return rows
