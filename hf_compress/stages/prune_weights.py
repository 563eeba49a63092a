"""Train a model while its weights are pruned, with or without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.core.saving import write_json
from hf_compress.methods.weight_pruning import WeightPruningCallback, WeightPruningConfig
from hf_compress.methods.weight_pruning.modeling import element_sparsity, sparsity_by_layer
from hf_compress.stages.finetune import add_teacher_columns, prepare, run, trainer_arguments
from hf_compress.stages.models import ModelArguments, open_classifier
from hf_compress.tasks.sources import DataArguments
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.trainer import CompressionTrainer


@dataclass
class PruningArguments:
    """What goes on beside pruning.

    Args:
        teacher_name_or_path: Hub name or folder of the fine-tuned dense model. Empty: no teacher.
        do_prune: False trains in the same way without pruning, for comparison.
    """

    teacher_name_or_path: str = field(
        default="", metadata={"help": "Hub name or folder of the teacher; none if empty."}
    )
    do_prune: bool = field(default=True, metadata={"help": "False: the same training without pruning."})


def prune_weights(
    model_args: ModelArguments,
    pruning: PruningArguments,
    data: DataArguments,
    args: DistillationArguments,
    config: WeightPruningConfig,
) -> dict[str, Any]:
    """Fine-tune a classifier with `WeightPruningCallback`, evaluate and save it.

    Args:
        model_args: What to start from, usually a fine-tuned classifier.
        pruning: Teacher, and whether to prune at all.
        data: The task.
        args: Everything about training; weights of the losses where there is a teacher.
        config: Pattern, sparsity, schedule.

    Returns:
        Metrics of the validation split, training time, and sparsity by layer.

    Raises:
        ValueError: If model, teacher and data do not fit together, the schedule does not fit the training, or the
            target is not reached.
    """
    task, tokenizer, model, rows = prepare(model_args, data, args.seed)
    common = trainer_arguments(model, tokenizer, args, rows)
    if pruning.do_prune:
        common["callbacks"] = [WeightPruningCallback(config)]
    if pruning.teacher_name_or_path and args.uses_teacher:
        teacher = open_classifier(pruning.teacher_name_or_path, task)
        add_teacher_columns(common, task, data, pruning.teacher_name_or_path)
        trainer = DistillationTrainer(teacher_model=teacher, **common)
    else:
        trainer = CompressionTrainer(**common)
    results = run(trainer, model, tokenizer, args)
    results["element_sparsity"] = element_sparsity(model)
    results["sparsity_by_layer"] = sparsity_by_layer(model, config)
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "results.json", results)
    return results
