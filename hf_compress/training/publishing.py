"""What a Trainer writes about its model and uploads: our card, results in the Hub's present form, and no pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length

from hf_compress.core.architectures import base_of
from hf_compress.core.errors import one_line
from hf_compress.core.pickles import is_pickle
from hf_compress.folder_card import FILE as CARD
from hf_compress.folder_card import add_compression, may_be_replaced
from hf_compress.hub_results import result_file


# What evaluations give besides metrics of the task.
_OTHERS = (
    "loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "jit_compilation_time",
    "model_preparation_time",
)


class PublishingTrainer(Trainer):
    """A `Trainer` whose cards tell of the methods, and whose uploads hold nothing that can run code."""

    def _core(self) -> PreTrainedModel:
        """The student without its wrappers (distributed training, adapters)."""
        core: PreTrainedModel = base_of(self.accelerator.unwrap_model(self.model))
        return core

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`, with errors in one line."""
        # Which errors its client raises depends on its release.
        with one_line("push_to_hub is set, but the hub cannot be used", Exception):
            super().init_hf_repo(*args, **kwargs)

    def create_model_card(self, *args: Any, dataset_tags: Any = None, dataset_args: Any = None, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with the steps of the model; a README.md that a person wrote stays.

        Args:
            args: As for `Trainer.create_model_card`, like kwargs.
            dataset_tags: A benchmark on the Hub, such as `nyu-mll/glue`: the last evaluation's metric is written to
                the folder `.eval_results`, from which the Hub lists it. Other names go into the card alone.
            dataset_args: Task within the benchmark, such as `sst2`.

        Raises:
            ValueError: If there is no evaluation to write, or its metric is not known.
        """
        file = Path(str(self.args.output_dir), CARD)
        if not self.is_world_process_zero():
            return
        benchmark, task = _only(dataset_tags), _only(dataset_args) or "default"
        found = self._result(benchmark, task) if "/" in benchmark else None
        if may_be_replaced(file):
            # A trainer that ours is joined with may take fewer.
            named = {"dataset_tags": dataset_tags, "dataset_args": dataset_args}
            kwargs |= {name: value for name, value in named.items() if value is not None}
            super().create_model_card(*args, **kwargs)
            add_compression(file, self._core(), self.hub_model_id)
            _drop_model_index(file)
        if found is not None:
            place = file.parent / found[0]
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(found[1])

    def _result(self, benchmark: str, task: str) -> tuple[str, bytes]:
        metric, value, update = measured(self.state.log_history, self.args)
        rows: Any = self.eval_dataset
        number = f"{len(rows)} examples" if has_length(rows) else "the evaluation's examples"
        return result_file(benchmark, task, value, f"{metric} on {number}, after {update} updates, by Trainer")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, with our card; nothing is uploaded from a folder that holds pickles.

        Args:
            args: As for `Trainer.push_to_hub`.
            kwargs: Also those of `create_model_card`.

        Raises:
            ValueError: If `output_dir` holds files that can run code when they are read.
        """
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            # `Trainer` uploads neither checkpoints nor what begins so; its own arguments are written as JSON.
            found = [file.name for file in sorted(folder.glob("*")) if file.is_file() and is_pickle(file)]
            found = [name for name in found if not name.startswith("_") and name != TRAINING_ARGS_NAME]
            if found:
                raise ValueError(
                    f"output_dir {str(folder)!r} must hold no pickles, which can run code when they are read, got "
                    f"{', '.join(found)}: remove them before push_to_hub."
                )
        return super().push_to_hub(*args, **kwargs)

    def upload_checkpoint(self, checkpoint: str) -> None:
        """Upload a whole checkpoint, as `hub_strategy` says."""
        self._push_from_checkpoint(checkpoint)


def _only(given: str | Sequence[str] | None) -> str:
    """A name, or the only one of a list; empty where there are none or several."""
    names = [given] if isinstance(given, str) else list(given or [])
    return names[0] if len(names) == 1 else ""


def measured(log: Sequence[Mapping[str, Any]], args: TrainingArguments) -> tuple[str, float, int]:
    """The task's metric in the last evaluation of a training.

    Args:
        log: `state.log_history` of a trainer.
        args: Its `metric_for_best_model` decides between several metrics.

    Returns:
        Name, value, and the number of updates before the evaluation.

    Raises:
        ValueError: If nothing was evaluated, or several metrics were and none is the main one.

    Example:
        >>> measured([{"eval_loss": 0.7, "eval_accuracy": 0.9, "step": 5}], TrainingArguments("out", use_cpu=True))
        ('accuracy', 0.9, 5)
    """
    entries = [entry for entry in log if any(name.startswith("eval_") for name in entry)]
    last = {} if not entries else entries[-1]
    values = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    metrics = [name for name in values if name not in _OTHERS and "/" not in name]
    main = (args.metric_for_best_model or "").removeprefix("eval_")
    chosen = [main] if main in metrics else metrics
    if len(chosen) != 1:
        raise ValueError(
            "dataset_tags names a benchmark, so the last evaluation must have one metric, got "
            f"{', '.join(metrics) or 'none'}: evaluate with compute_metrics, and let metric_for_best_model name one "
            "of several."
        )
    return chosen[0], values[chosen[0]], last["step"]


def _drop_model_index(file: Path) -> None:
    """The older form of results, which `Trainer` writes even where there are none."""
    card = ModelCard.load(file)
    card.data.eval_results = card.data.model_name = None
    file.write_text(str(card), encoding="utf-8")
