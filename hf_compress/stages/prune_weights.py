"""Train a model while its weights are pruned, with or without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.api import steps_of
from hf_compress.core.architectures import blocks_of
from hf_compress.core.cost import count_cost
from hf_compress.core.saving import write_json
from hf_compress.methods.weight_pruning import WeightPruningCallback, WeightPruningConfig, slim
from hf_compress.methods.weight_pruning.modeling import element_sparsity, sparsity_by_layer
from hf_compress.stages.finetune import add_teacher_columns, prepare, run, trainer_arguments
from hf_compress.stages.models import ModelArguments, open_classifier, save_stage
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
        slim: Cut dead channels and heads out of the trained model; needs a channel pattern.
    """

    teacher_name_or_path: str = field(
        default="", metadata={"help": "Hub name or folder of the teacher; none if empty."}
    )
    do_prune: bool = field(default=True, metadata={"help": "False: the same training without pruning."})
    slim: bool = field(default=False, metadata={"help": "Cut pruned channels out: smaller layers, not zeros."})


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
        Metrics of the validation split, training time, and sparsity by layer; with `slim` the cost before and after.

    Raises:
        ValueError: If model, teacher and data do not fit together, the schedule does not fit the training, or the
            target is not reached; with `slim`, if the pattern leaves no whole channel or the model cannot be cut.
    """
    if pruning.slim and not (pruning.do_prune and config.prunes_channels):
        raise ValueError(
            "slim must go with do_prune and a pattern 'Nxchannel' or 'channelxN', got "
            f"pattern={config.pattern!r}: others leave no whole channel to cut out."
        )
    task, tokenizer, model, rows = prepare(model_args, data, args.seed)
    if pruning.slim:
        # Hours of training later would be late to learn that a model cannot be cut.
        blocks_of(model)
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
    if pruning.slim:
        results["slimmed"] = _slimmed(model)
    if trainer.is_world_process_zero():
        if results.get("slimmed"):
            save_stage(args.output_dir, model, tokenizer, results)
        write_json(Path(args.output_dir) / "results.json", results)
    return results


def _slimmed(model: PreTrainedModel) -> dict[str, Any] | None:
    """The cost before and after `slim`, and the sizes that are left; None when there was nothing to remove."""
    before, steps = count_cost(model), steps_of(model)
    slim(model)
    if steps_of(model) == steps:
        return None
    done = steps_of(model)[-1]
    sizes = {name: done[name] for name in ("heads_per_layer", "neurons_per_layer")}
    return {"before": before.to_dict(), "after": count_cost(model).to_dict(), **sizes}
