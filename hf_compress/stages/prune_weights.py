"""Train a model while its weights are pruned, with or without a teacher; or prune them at once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_compress.api import compress, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import count_cost
from hf_compress.core.saving import require_own_folder, write_json
from hf_compress.methods.weight_pruning import WeightPruningCallback, WeightPruningConfig, slim
from hf_compress.methods.weight_pruning.sparsity import sparsity_by_layer
from hf_compress.report.sparsity import element_ratio, matrices_of
from hf_compress.stages.finetune import add_teacher_columns, model_folders, prepare, run, trainer_arguments
from hf_compress.stages.models import ModelArguments, open_model, save_stage
from hf_compress.tasks.inputs import calibration_batches, check_draw
from hf_compress.tasks.sources import DataArguments
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.trainer import CompressionTrainer


@dataclass
class PruningArguments:
    """What goes on beside pruning.

    Args:
        teacher_name_or_path: Hub name or folder of the fine-tuned dense model that teaches. Left out: no teacher.
        do_prune: Whether to prune. False trains in the same way without pruning, for comparison.
        slim: Cut dead channels and heads out of the pruned model, which makes its layers smaller; needs a channel
            pattern.
        calibration_samples: How many training examples pruning looks at when nothing is trained (`num_train_epochs=0`)
            and the criterion needs data; they are drawn without replacement.
        calibration_seed: Random seed of the draw of those examples.
    """

    teacher_name_or_path: str = ""
    do_prune: bool = True
    slim: bool = False
    calibration_samples: int = 512
    calibration_seed: int = 0

    def __post_init__(self) -> None:
        check_draw(self.calibration_samples, self.calibration_seed)


def prune_weights(
    model_args: ModelArguments,
    pruning: PruningArguments,
    data: DataArguments,
    args: DistillationArguments,
    config: WeightPruningConfig,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Fine-tune a classifier with `WeightPruningCallback`, or prune it at once; evaluate and save it.

    Args:
        model_args: What to start from, usually a fine-tuned classifier.
        pruning: Teacher, and whether to prune at all.
        data: The task.
        args: Everything about training; weights of the losses where there is a teacher. `num_train_epochs=0`: the
            target is reached at once, without training, which `wanda` and `sparsegpt` demand.
        config: Pattern, sparsity, schedule.
        given: Names of the settings that the user wrote; those that would change nothing are refused.

    Returns:
        Metrics of the validation split, seconds of training or pruning, sparsity by layer; with `slim` the cost
        before and after.

    Raises:
        ValueError: If model, teacher and data do not fit together, the schedule does not fit the training, or the
            target is not reached; with `slim`, if the pattern leaves no whole channel or the model cannot be cut.
    """
    if pruning.slim and not (pruning.do_prune and config.prunes_channels):
        raise ValueError(
            "slim must go with do_prune and a pattern 'Nxchannel', 'channelxN' or 'mha', got "
            f"pattern={config.pattern!r}: others leave no whole channel to cut out."
        )
    at_once = pruning.do_prune and args.num_train_epochs == 0 and args.max_steps <= 0
    if at_once and pruning.teacher_name_or_path:
        raise ValueError(
            f"teacher_name_or_path must be empty with num_train_epochs=0, got {pruning.teacher_name_or_path!r}: "
            "nothing is taught."
        )
    if pruning.do_prune and not at_once:
        _require_training(config, args)
    if not pruning.teacher_name_or_path and not at_once and (args.alpha_layer or not args.alpha_task):
        raise ValueError(
            f"teacher_name_or_path must be given with alpha_task={args.alpha_task:g} and "
            f"alpha_layer={args.alpha_layer:g}: without a teacher, only the labels teach."
        )
    _require_effect(pruning, at_once, given)
    require_own_folder(args.output_dir, model_folders(model_args, pruning.teacher_name_or_path))
    task, tokenizer, model, rows = prepare(model_args, data, args.seed, trains=not at_once)
    if pruning.slim:
        # Hours of training later would be late to learn that a model cannot be cut.
        layers_of(model)
    common = trainer_arguments(task, model, tokenizer, args, rows)
    if at_once:
        return _prune_at_once(common, pruning, config)
    if pruning.do_prune:
        common["callbacks"] = [WeightPruningCallback(config)]
    if pruning.teacher_name_or_path and args.uses_teacher:
        teacher = open_model(pruning.teacher_name_or_path, task)
        add_teacher_columns(common, task, data, pruning.teacher_name_or_path)
        trainer = DistillationTrainer(teacher_model=teacher, **common)
    else:
        trainer = CompressionTrainer(**common)
    results = run(trainer, model, tokenizer, args)
    results.update(_zeros(model, config, pruning.slim))
    if trainer.is_world_process_zero():
        if results.get("slimmed"):
            save_stage(args.output_dir, model, tokenizer, results)
        write_json(Path(args.output_dir) / "results.json", results)
    return results


def _require_effect(pruning: PruningArguments, at_once: bool, given: Collection[str]) -> None:
    """Refuse written settings that nothing would read."""
    taught = {field.name for field in dataclasses.fields(DistillationArguments)}
    taught -= {field.name for field in dataclasses.fields(TrainingArguments)} | {"alpha_task"}
    rules = (
        (taught, bool(pruning.teacher_name_or_path), "a teacher (teacher_name_or_path)"),
        ({"calibration_samples", "calibration_seed"}, at_once, "pruning without training (num_train_epochs=0)"),
    )
    for names, effective, needs in rules:
        for name in sorted(names & set(given)):
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


def _prune_at_once(common: dict[str, Any], pruning: PruningArguments, config: WeightPruningConfig) -> dict[str, Any]:
    # The trainer puts the model on its device and evaluates it.
    trainer = CompressionTrainer(**common)
    model, tokenizer = common["model"], common["processing_class"]
    results: dict[str, Any] = {}
    batches = None
    if any(entry.needs_gradients or entry.needs_inputs for entry in config.resolved()):
        rows = common["train_dataset"].remove_columns("length")
        batches = calibration_batches(rows, tokenizer, pruning.calibration_samples, pruning.calibration_seed)
        results.update(calibration_samples=pruning.calibration_samples, calibration_seed=pruning.calibration_seed)
    start = time.perf_counter()
    compress(model, config, data=batches)
    results["prune_seconds"] = round(time.perf_counter() - start, 3)
    if trainer.eval_dataset is not None:
        results.update(trainer.evaluate(), eval_split=str(trainer.eval_dataset.split))
    results.update(_zeros(model, config, pruning.slim))
    if trainer.is_world_process_zero():
        save_stage(trainer.args.output_dir, model, tokenizer, results)
    return results
