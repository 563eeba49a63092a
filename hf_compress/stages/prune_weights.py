"""Train a model while its weights are pruned, with or without a teacher; or prune them at once."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_compress.api import compress, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import count_cost
from hf_compress.core.saving import write_json
from hf_compress.methods.weight_pruning import WeightPruningCallback, WeightPruningConfig, slim
from hf_compress.methods.weight_pruning.sparsity import sparsity_by_layer
from hf_compress.report.sparsity import element_ratio, matrices_of
from hf_compress.stages.arguments import (
    CalibrationArguments,
    DeviceArguments,
    OptionalTeacherArguments,
    StageArguments,
)
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.saved import save_stage
from hf_compress.stages.training import (
    add_teacher_columns,
    evaluation_results,
    prepare,
    run_training,
    trainer_arguments,
)
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.inputs import calibration_batches
from hf_compress.tasks.task import Task
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.trainer import CompressionTrainer


@dataclass
class PruningArguments:
    """Options beside those of pruning.

    Args:
        do_prune: Whether to prune. False trains in the same way without pruning, for comparison.
        slim: Cut dead channels and heads out of the pruned model, which makes its layers smaller; needs a channel
            pattern.
    """

    do_prune: bool = True
    slim: bool = False


@dataclass(frozen=True, kw_only=True)
class PruneWeights(StageArguments):
    """What `prune_weights` takes.

    Args:
        model: What to start from, usually a fine-tuned model.
        pruning: Pattern, sparsity, schedule.
        also: Whether to prune at all, and what comes after.
        calibration: Which training examples are looked at when nothing is trained and the criterion needs data.
        teacher: Teaches while the model is pruned.
        data: The task.
        device: Where the training runs.
        distillation: Everything about training, and the weights of the losses where there is a teacher.
            `num_train_epochs=0`: the target is reached at once, without training, which `wanda` and `sparsegpt`
            demand.
    """

    model: ModelArguments
    pruning: WeightPruningConfig
    also: PruningArguments = field(default_factory=PruningArguments)
    calibration: CalibrationArguments = CalibrationArguments()
    teacher: OptionalTeacherArguments = field(default_factory=OptionalTeacherArguments)
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    distillation: DistillationArguments

    @property
    def at_once(self) -> bool:
        """Whether the target is reached without training."""
        return self.also.do_prune and self.distillation.num_train_epochs == 0 and self.distillation.max_steps <= 0


def prune_weights(arguments: PruneWeights) -> dict[str, Any]:
    """Fine-tune a model with `WeightPruningCallback`, or prune it at once; evaluate and save it.

    Returns:
        Metrics of the validation split, seconds of training or pruning, sparsity by prunable weight; with `slim` the
        cost before and after.

    Raises:
        ValueError: If model, teacher and data do not fit together, the schedule does not fit the training, or the
            target is not reached; with `slim`, if the pattern leaves no whole channel or the model cannot be cut.
    """
    _require_sense(arguments)
    config, args, slims = arguments.pruning, arguments.distillation, arguments.also.slim
    teacher_name = arguments.teacher.teacher_name_or_path
    task, tokenizer, model, rows = prepare(arguments.model, arguments.data, args.seed, trains=not arguments.at_once)
    if slims:
        # Hours of training later would be late to learn that a model cannot be cut.
        layers_of(model)
    common = trainer_arguments(task, model, tokenizer, args, rows)
    if arguments.at_once:
        return _prune_at_once(task, common, arguments)
    if arguments.also.do_prune:
        common["callbacks"].append(WeightPruningCallback(config))
    if teacher_name and args.uses_teacher:
        teacher = open_model(teacher_name, task)
        add_teacher_columns(common, task, arguments.data, teacher_name)
        trainer: CompressionTrainer = DistillationTrainer(teacher_model=teacher, **common)
    else:
        trainer = CompressionTrainer(**common)
    results = run_training(trainer, task, model, tokenizer, args, teacher_name if args.uses_teacher else None)
    results.update(_zeros(model, config, slims))
    if trainer.is_world_process_zero():
        if results.get("slimmed"):
            save_stage(arguments.output_dir, model, tokenizer, results, task)
        write_json(Path(arguments.output_dir) / "results.json", results)
    return results


def _require_sense(arguments: PruneWeights) -> None:
    """Refuse options that contradict each other, or that were written and would change nothing."""
    pruning, config, args, at_once = arguments.also, arguments.pruning, arguments.distillation, arguments.at_once
    teacher = arguments.teacher.teacher_name_or_path
    if pruning.slim and not (pruning.do_prune and config.prunes_channels):
        raise ValueError(
            "slim must go with do_prune and a pattern 'Nxchannel', 'channelxN' or 'mha', got "
            f"pattern={config.pattern!r}: others leave no whole channel to cut out."
        )
    if at_once and teacher:
        raise ValueError(
            f"teacher_name_or_path must be empty with num_train_epochs=0, got {teacher!r}: nothing is taught."
        )
    if pruning.do_prune and not at_once:
        _require_training(config, args)
    if not teacher and not at_once and (args.alpha_layer or not args.alpha_task):
        raise ValueError(
            f"teacher_name_or_path must be given with alpha_task={args.alpha_task:g} and "
            f"alpha_layer={args.alpha_layer:g}: without a teacher, only the labels teach."
        )
    taught = {entry.name for entry in dataclasses.fields(DistillationArguments)}
    taught -= {entry.name for entry in dataclasses.fields(TrainingArguments)} | {"alpha_task"}
    rules = (
        (taught, bool(teacher), "a teacher (teacher_name_or_path)"),
        ({"calibration_samples", "calibration_seed"}, at_once, "pruning without training (num_train_epochs=0)"),
    )
    for names, effective, needs in rules:
        for name in sorted(names & arguments.chosen()):
            if not effective:
                raise ValueError(f"{name} must go with {needs}: nothing else reads it.")


def _zeros(model: PreTrainedModel, config: WeightPruningConfig, with_slim: bool) -> dict[str, Any]:
    """Where the zeros are, counted before they are cut out."""
    found: dict[str, Any] = {
        "element_sparsity": element_ratio(matrices_of(model)),
        "sparsity_by_layer": sparsity_by_layer(model, config),
    }
    if with_slim:
        found["slimmed"] = _slimmed(model)
    return found


def _slimmed(model: PreTrainedModel) -> dict[str, Any] | None:
    """The cost before and after `slim`, and the sizes that are left; None when there was nothing to remove."""
    before, steps = count_cost(model), steps_of(model)
    slim(model)
    if steps_of(model) == steps:
        return None
    done = steps_of(model)[-1]
    sizes = {name: done[name] for name in ("heads_per_layer", "neurons_per_layer")}
    return {"before": before.to_dict(), "after": count_cost(model).to_dict(), **sizes}


def _require_training(config: WeightPruningConfig, args: DistillationArguments) -> None:
    for entry in config.resolved():
        if entry.needs_inputs:
            raise ValueError(
                f"num_train_epochs must be 0 (and max_steps unset) with criterion={entry.criterion!r}, which prunes "
                f"at once, got {args.num_train_epochs:g} and {args.max_steps}."
            )


def _prune_at_once(task: Task, common: dict[str, Any], arguments: PruneWeights) -> dict[str, Any]:
    config, draw = arguments.pruning, arguments.calibration
    # The trainer puts the model on its device and evaluates it.
    trainer = CompressionTrainer(**common)
    model, tokenizer = common["model"], common["processing_class"]
    results: dict[str, Any] = {}
    batches = None
    if any(entry.needs_gradients or entry.needs_inputs for entry in config.resolved()):
        rows = common["train_dataset"].remove_columns("length")
        samples = arguments.calibration_samples(len(rows))
        batches = calibration_batches(rows, tokenizer, samples, draw.calibration_seed)
        results.update(calibration_samples=samples, calibration_seed=draw.calibration_seed)
    start = time.perf_counter()
    compress(model, config, data=batches)
    results["prune_seconds"] = round(time.perf_counter() - start, 3)
    results |= evaluation_results(trainer, task)
    results.update(_zeros(model, config, arguments.also.slim))
    if trainer.is_world_process_zero():
        save_stage(arguments.output_dir, model, tokenizer, results, task)
    return results
