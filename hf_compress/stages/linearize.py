"""Turn a model's softmax attention into linear attention."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api import compress, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import layer_macs
from hf_compress.core.positions import most_tokens
from hf_compress.methods.linformer import LinformerConfig
from hf_compress.stages.arguments import DeviceArguments, OutputArguments, StageArguments
from hf_compress.stages.models import ModelArguments, fit_labels, has_head, open_pair
from hf_compress.stages.saved import save_stage
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.sources import load_task
from hf_compress.tasks.task import Task


logger = logging.getLogger(__name__)


_MEASURED_TEXTS = 2000
_LENGTHS = (128, 512, 2048)
# More tokens than any text has; tokenizers cannot cut at the even larger number that stands for no limit.
_UNLIMITED = 2**20


@dataclass(frozen=True, kw_only=True)
class Linearize(StageArguments):
    """What `linearize` takes.

    Args:
        model: A fine-tuned classifier (the start of target-guided and hybrid training) or a pretrained encoder (of
            unguided, trajectory- and waypoint-guided training), which gets a new head for the task.
        linear_attention: What to make.
        data: The task, whose texts are measured; only needed when the model has no head yet.
        output: Where it goes.
        device: Where it is computed.
    """

    model: ModelArguments
    linear_attention: LinformerConfig
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()


def linearize(arguments: Linearize) -> dict[str, Any]:
    """Convert a model to linear attention and save it, untrained.

    Returns:
        The recorded step, the parameters before and after, the fraction of the dense arithmetic at some lengths, and
        under `texts` that on the task's own texts.

    Raises:
        ValueError: If the model cannot be opened or converted.
    """
    model_args, data, config = arguments.model, arguments.data, arguments.linear_attention
    named = data.task_name or data.data_dir or data.train_file or data.validation_file or data.test_file
    for name in ("text_column", "text_pair_column", "label_column"):
        if getattr(data, name) is not None and not named:
            raise ValueError(f"{name} is {getattr(data, name)!r}, but no task is named (task_name or data_dir).")
    torch.manual_seed(config.seed)
    task = load_task(data) if named else None
    tokenizer, model = open_pair(model_args, task, fresh_head=True)
    if task is not None:
        fit_labels(task, model, model_args.model_name_or_path)
    arguments.device.place_(model)
    if not named and not has_head(model_args.model_name_or_path):
        logger.warning(
            "%s has no head: it gets one with %d labels. Name the task (task_name or data_dir) to size it.",
            model_args.model_name_or_path,
            model.config.num_labels,
        )
    params = sum(parameter.numel() for parameter in model.parameters())
    dense_macs = {length: _macs(model, [length]) for length in _LENGTHS}
    lengths = []
    if task is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
        lengths = _text_lengths(task, tokenizer, config.max_tokens or most_tokens(model))
    dense_texts = _macs(model, lengths)
    compress(model, config)
    step = steps_of(model)[-1]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.model_max_length = step["max_tokens"]
    results = {
        "step": step,
        "params": {"before": params, "after": sum(parameter.numel() for parameter in model.parameters())},
        "mac_ratio_by_length": {length: _macs(model, [length]) / dense for length, dense in dense_macs.items()},
    }
    if lengths:
        ratio = _macs(model, lengths) / dense_texts
        median = statistics.median_low(lengths)
        results["texts"] = {"mac_ratio": ratio, "median_tokens": median, "longest_tokens": max(lengths)}
        if ratio >= 1:
            logger.warning(
                "Linear attention costs more than it saves on this task: its texts have %d tokens in the median and "
                "need %.2f times the dense arithmetic. projected_length=%d pays from about %d tokens on: take a lower "
                "one, or another method for short texts (prune-structure).",
                median, ratio, config.projected_length, 2 * config.projected_length,
            )  # fmt: skip
    save_stage(arguments.output.output_dir, model, tokenizer, results, task)
    return results


def _text_lengths(task: Task, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[int]:
    """Tokens of each example of the task, of a sample when there are many."""
    split = "train" if "train" in task.splits else next(iter(task.splits))
    rows = task.splits[split]
    if len(rows) > _MEASURED_TEXTS:
        rows = rows.shuffle(seed=0).select(range(_MEASURED_TEXTS))
    sample = dataclasses.replace(task, splits=DatasetDict({split: rows}))
    most = min(longest or _UNLIMITED, tokenizer.model_max_length, _UNLIMITED)
    return [len(ids) for ids in sample.encode(split, tokenizer, most)["input_ids"]]


def _macs(model: PreTrainedModel, lengths: Sequence[int]) -> float:
    blocks = layers_of(model)
    counts = Counter(lengths)
    return sum(count * sum(layer_macs(block, length) for block in blocks) for length, count in counts.items())
