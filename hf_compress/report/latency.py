"""How long models take, measured side by side in one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.exported import ExportedModel
from hf_compress.core.modes import evaluating
from hf_compress.core.timing import time_in_turns
from hf_compress.report.memory import peak_memory
from hf_compress.tasks.inputs import padded_batch, row_lengths
from hf_compress.tasks.task import Processor


@dataclass(frozen=True)
class Latency:
    """The result of timing one model on a set of batches.

    Args:
        name: Of the model.
        batch_size: Examples in the largest batch.
        p50: Seconds a batch: median over repeats of the time for all batches, divided by their number.
        p95: Seconds a batch: 95th percentile over repeats.
        throughput: Examples a second at the median.
        peak_memory: Bytes that the model and its largest batch need at once; None in other runtimes than PyTorch,
            which do not tell.
        memory_kind: What `peak_memory` counts.
        threads: Of torch, inside one operation.
        dtype: Of the parameters.
        attention: The attention implementation of transformers, or `unknown`; `exported` in other runtimes.
        device: Where the model ran.
        num_batches, num_examples: In one repeat.
        repeats: Times that all batches were run and timed.
        totals: Seconds of each repeat, in order; entry i of two models was measured in the same round.
        runtime: What computed it.
    """

    name: str
    batch_size: int
    p50: float
    p95: float
    throughput: float
    peak_memory: int | None
    memory_kind: str
    threads: int
    dtype: str
    attention: str
    device: str
    num_batches: int
    num_examples: int
    repeats: int
    totals: tuple[float, ...]
    runtime: str = "PyTorch"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "totals": list(self.totals)}


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the baseline a model ran, from the ratios of rounds.

    Args:
        median, low, high: Median, smallest and largest ratio; above 1 is faster.
    """

    median: float
    low: float
    high: float


def _named(models: Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(models, nn.Module):
        raise ValueError(f"models must be a dict or a list of models, got one {type(models).__name__}.")
    if not isinstance(models, Mapping):
        models = {f"{type(model).__name__}-{index}": model for index, model in enumerate(models)}
    if not models:
        raise ValueError("models must hold at least one model, got none.")
    return dict(models)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype_of(model: nn.Module) -> str:
    if isinstance(model, ExportedModel):
        return model.numbers
    return str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch.")


def _attention_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or "unknown"


def _prepared(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """What the forward pass takes, without labels, on the model's device: a transfer is not the model's time."""
    device = _device_of(model)
    prepared = []
    for batch in batches:
        tensors = {k: v.to(device) for k, v in batch.items() if torch.is_tensor(v) and k != "labels"}
        inputs = accepted_arguments(model, tensors)
        if not inputs:
            raise ValueError(f"batches must hold tensors that {type(model).__name__} takes, got {sorted(batch)}.")
        prepared.append(inputs)
    return prepared


def measure_latency(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    batches: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    repeats: int = 10,
    warmup: int = 2,
) -> list[Latency]:
    """Time models that take turns on the same batches, so that whatever else the machine does hits all of them.

    Args:
        models: Name -> model, or models. Each runs where it is, in eval mode, and gets its mode back.
        batches: Dicts of input tensors. Labels, and inputs that a model does not take, are left out. Models that read
            the same texts by different tokenizers have batches of their own: model name -> batches.
        repeats: Timed rounds over all batches.
        warmup: Rounds before that are not timed.

    Returns:
        One entry a model, in order.

    Raises:
        ValueError: If there are no models or batches, `repeats` is below 1 or `warmup` below 0.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> [timed] = measure_latency({"dense": model}, [{"input": torch.zeros(2, 4)}], repeats=3)
        >>> timed.batch_size, timed.num_batches, len(timed.totals)
        (2, 1, 3)
    """
    named = _named(models)
    if isinstance(batches, Mapping):
        given = {name: list(batches[name]) for name in named}
    else:
        given = dict.fromkeys(named, list(batches))
    counts = {name: len(own) for name, own in given.items()}
    if not all(counts.values()):
        raise ValueError("batches must hold at least one batch, got none.")
    if len(set(counts.values())) > 1:
        raise ValueError(f"batches must be equally many for all models, got {counts}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}.")
    with evaluating(*named.values()):
        inputs = {name: _prepared(model, given[name]) for name, model in named.items()}
        devices = {name: _device_of(model) for name, model in named.items()}
        runs = {name: [partial(model, **batch) for batch in inputs[name]] for name, model in named.items()}
        with torch.inference_mode():
            totals = time_in_turns(runs, devices, repeats, warmup)
        return [_summary(name, model, inputs[name], totals[name]) for name, model in named.items()]


def _summary(name: str, model: nn.Module, inputs: list[dict[str, Tensor]], totals: list[float]) -> Latency:
    sizes = [len(next(iter(batch.values()))) for batch in inputs]
    largest = max(inputs, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
    exported = isinstance(model, ExportedModel)
    memory, memory_kind = (None, "not known") if exported else peak_memory(model, largest)
    median = float(np.median(totals))
    return Latency(
        name=name,
        batch_size=max(sizes),
        p50=median / len(inputs),
        p95=float(np.quantile(totals, 0.95)) / len(inputs),
        throughput=sum(sizes) / median,
        peak_memory=memory,
        memory_kind=memory_kind,
        threads=torch.get_num_threads(),
        dtype=_dtype_of(model),
        attention="exported" if exported else _attention_of(model),
        device=str(_device_of(model)),
        num_batches=len(inputs),
        num_examples=sum(sizes),
        repeats=len(totals),
        totals=tuple(totals),
        runtime=model.runtime if isinstance(model, ExportedModel) else "PyTorch",
    )


def speedups(latencies: Sequence[Latency], baseline: str) -> dict[str, Speedup]:
    """How many times faster than the baseline each model is, paired by round.

    Args:
        latencies: Of one call of `measure_latency`.
        baseline: Name of the model that the others are compared with.

    Raises:
        ValueError: If the baseline is not among them or the entries are not of one run.
    """
    by_name = {latency.name: latency for latency in latencies}
    if baseline not in by_name:
        raise ValueError(f"baseline must be one of {', '.join(by_name)}, got {baseline!r}.")
    reference = by_name[baseline]
    result = {}
    for latency in latencies:
        if (latency.num_examples, latency.num_batches, latency.repeats) != (
            reference.num_examples, reference.num_batches, reference.repeats,
        ):  # fmt: skip
            raise ValueError(
                f"latencies must be of one run with {reference.repeats} repeats of {reference.num_batches} batches, "
                f"got {latency.repeats} of {latency.num_batches} for {latency.name!r}."
            )
        ratios = [ours / theirs for ours, theirs in zip(reference.totals, latency.totals, strict=True)]
        result[latency.name] = Speedup(float(np.median(ratios)), min(ratios), max(ratios))
    return result


def batches_by_length(rows: Dataset, batch_size: int, limit: int | None = None) -> list[list[int]]:
    """Choose the rows of each batch, so that the rows of a batch have about the same length.

    Args:
        rows: Encoded examples; images all count as equally long.
        batch_size: Examples.
        limit: At most about so many examples, in whole batches spread evenly over the lengths; None: all.

    Returns:
        For each batch the indices of its rows.

    Raises:
        ValueError: If there are no rows, or `batch_size` or `limit` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if not len(rows):
        raise ValueError("rows must hold at least one example, got none.")
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    wanted = math.ceil(limit / batch_size) if limit is not None else len(batches)
    if wanted < len(batches):
        batches = [batches[int((index + 0.5) * len(batches) / wanted)] for index in range(wanted)]
    return batches


def batches_of(rows: Dataset, processor: Processor, batches: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """The batches of `batches_by_length`, padded, without labels."""
    padded = [padded_batch(rows, indices, processor) for indices in batches]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in padded]


def unpadded_batches(
    rows: Dataset, processor: Processor, batch_size: int, limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Batches of rows of about the same length, without labels: no padding at size 1, the least possible above.

    Args:
        rows, batch_size, limit: As for `batches_by_length`.
        processor: Tokenizer or image processor of the model.
    """
    return batches_of(rows, processor, batches_by_length(rows, batch_size, limit))
