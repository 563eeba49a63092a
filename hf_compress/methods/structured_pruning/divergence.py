"""Measures how far a model's outputs move when one sublayer alone is cut, at several sizes.

Letters: n units of a sublayer, k kept units, C classes or tokens of a vocabulary, D hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.batches import base_inputs, layer_mask, on_device, seen_tokens
from hf_compress.core.calibration import with_progress
from hf_compress.core.data_needs import Data, require_batches
from hf_compress.core.forward_state import carries_state, forward_state
from hf_compress.core.modes import evaluating
from hf_compress.core.moments import SecondMoments
from hf_compress.core.processes import added_up
from hf_compress.core.projections import Projection
from hf_compress.core.replaying import outputs_recorded, replayed
from hf_compress.core.surgery import unit_columns
from hf_compress.methods.structured_pruning.allocation import UnitKind
from hf_compress.methods.structured_pruning.correction import output_projection
from hf_compress.methods.structured_pruning.decomposition import interpolation_matrix
from hf_compress.methods.structured_pruning.selection import Ranking


# Fractions of a sublayer's units at which it is tried.
_LEVELS = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)
# Live tokens that are compared at most.
_TOKENS = 2048
# Numbers in the outputs that are compared at most: those of a large vocabulary take memory and time.
_NUMBERS = 2**24
# Where that limits the tokens, sequences are cut to this length, so that several of them are seen.
_SHORT = 64


class Answers:
    """What a model answers, as rows: log-probabilities [rows, C], or the numbers [rows, D] of what does not classify.

    Args:
        model: Runs in the mode that it is in.
        step: Of the live tokens only every so many has a row: those of a large vocabulary take memory.
    """

    def __init__(self, model: PreTrainedModel, step: int = 1) -> None:
        self._model = model
        self._step = step
        self.classifies = False

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """[rows, C or D] float32; padding has no row, the scores of an answer's ends are two rows an example, and each
        of several labels that hold at once is a row of two classes."""
        inputs = {name: value for name, value in on_device(self._model, batch).items() if name != "labels"}
        found = self._model(**inputs, return_dict=True, **forward_state(self._model))
        if "start_logits" in found:
            self.classifies = True
            ends = torch.cat([found["start_logits"], found["end_logits"]])
            return torch.log_softmax(ends.float(), -1)
        values = found["logits"] if "logits" in found else found[0]
        if "logits" in found and self._model.config.problem_type == "multi_label_classification":
            self.classifies = True
            either = torch.stack([values, torch.zeros_like(values)], -1).reshape(-1, 2)
            return torch.log_softmax(either.float(), -1)
        self.classifies = "logits" in found and values.shape[-1] > 1
        mask = layer_mask(self._model, inputs)
        if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
            values = values[mask]
        # A copy, so that the other rows go.
        rows = values.reshape(-1, values.shape[-1])[:: self._step].clone().float()
        return torch.log_softmax(rows, -1) if self.classifies else rows


class Distances:
    """How far the outputs of some trials are from those of the dense model; sums over rows, as processes need them.

    Args:
        trials: How many there are.
        device: Of the model.
    """

    def __init__(self, trials: int, device: torch.device) -> None:
        self._apart = torch.zeros(trials, dtype=torch.float64, device=device)
        self._whole = torch.zeros((), dtype=torch.float64, device=device)

    def sums(self) -> list[Tensor]:
        return [self._apart, self._whole]

    def count(self, dense: Sequence[Tensor], classifies: bool) -> None:
        for rows in dense:
            self._whole += len(rows) if classifies else rows.square().sum()

    def add(self, trial: int, dense: Tensor, rows: Tensor, classifies: bool) -> None:
        apart = dense.exp() * (dense - rows) if classifies else (dense - rows).square()
        # An impossible class (an answer that ends in padding) does not count: no number times minus infinity.
        self._apart[trial] += apart.masked_fill(dense.isneginf(), 0.0).sum()

    def means(self) -> list[float]:
        """[trials]: Kullback-Leibler divergence in nats a row, or squared distance as a share of the dense outputs."""
        # Outputs that a cut has made infinite or NaN are as far away as can be.
        far = torch.finfo(torch.float32).max
        means: list[float] = (self._apart / self._whole).nan_to_num(nan=far, posinf=far).tolist()
        return means


@torch.no_grad()
def divergence_priorities(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    rankings: Mapping[tuple[int, UnitKind], Ranking],
    moments: Mapping[tuple[int, UnitKind], SecondMoments],
    data: Data,
    mean_length: float,
) -> dict[tuple[int, UnitKind], list[float]]:
    """How much each unit brings the outputs of a model nearer to those of the dense one.

    Each sublayer is cut alone, to several sizes, and corrected; everything else stays dense. Between those sizes the
    divergence is interpolated on its lower convex hull, so that the priorities of a sublayer never rise.

    Args:
        model: Intact; its weights are the same bits afterwards.
        layers: Its layers.
        rankings: (layer index, kind) -> the units of each sublayer, most important first.
        moments: The same -> moments of the output projection's input.
        data: Batches of inputs, those that were measured. Labels are not read. About 2,048 live tokens are, of
            examples from all over the data; of a language model with a large vocabulary fewer (with 50,000 tokens
            335), from the beginnings of sequences.
        mean_length: Tokens of an average example.

    Returns:
        (layer index, kind) -> [units]: by how much the divergence falls when each unit is kept after those before it.

    Raises:
        ValueError: If the model's outputs are not finite.
    """
    answers, priorities = Answers(model), {}
    examples = next(iter(moments.values())).num_rows / mean_length
    with evaluating(model):
        wanted = min(_TOKENS, _NUMBERS // (vocabulary_of(model) or 1))
        longest = _SHORT if wanted < _TOKENS else None
        batches = some_examples(model, data, examples, mean_length, wanted, longest)
        modules, dense, returned = [layer.module for layer in layers], [], []
        for batch in batches:
            with outputs_recorded(modules) as found:
                dense.append(answers(batch))
            # Layers that drop tokens also change what later layers read beside their input.
            returned.append([] if carries_state(model) else found)
        if any(bool(torch.isnan(rows).any()) for rows in dense):
            raise ValueError(
                "The model's outputs must be finite for allocation='divergence', got NaN. Check its weights."
            )
        for key, ranking in with_progress(list(rankings.items()), "divergence"):
            layer, units = layers[key[0]], len(ranking.order)
            out = output_projection(layer, key[1])
            size = layer.unit_size if key[1] == "heads" else 1
            sizes = sorted({round(level * units) for level in _LEVELS} - {units})
            distances, gram = Distances(len(sizes), model.device), moments[key].gram
            intact = out.weight.detach().clone()
            try:
                with added_up(distances):
                    for trial, kept in enumerate(sizes):
                        columns = unit_columns(sorted(ranking.order[:kept]), size).to(gram.device)
                        cut_output_(out, intact, gram, columns)
                        for rows, batch, outputs in zip(dense, batches, returned, strict=True):
                            # The layers before the one that is cut compute what they have computed already.
                            same = outputs[: key[0]]
                            with replayed(modules[: len(same)], same):
                                distances.add(trial, rows, answers(batch), answers.classifies)
                    distances.count(dense, answers.classifies)
            finally:
                out.weight.copy_(intact)
            priorities[key] = falls(dict(zip([*sizes, units], [*distances.means(), 0.0], strict=True)))
    return priorities


def cut_output_(out: Projection, intact: Tensor, gram: Tensor, columns: Tensor) -> None:
    """Let an output projection read some columns of its input only, corrected for the others.

    Args:
        out: The projection; its weight is overwritten.
        intact: [D, W], the weight of the intact model.
        gram: [W, W] moments of its input.
        columns: [k] int64, ascending.
    """
    out.weight.zero_()
    out.weight[:, columns] = (intact.to(gram) @ interpolation_matrix(gram, columns).T).to(intact)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Tokens that a language model chooses from; 0 for other models."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    return 0 if head is None else head.weight.shape[0]


def some_examples(
    model: PreTrainedModel, data: Data, examples: float, mean_length: float, wanted: int, longest: int | None = None
) -> list[Mapping[str, Any]]:
    """Examples from all over the data, which may be sorted, that together hold about as many tokens as are wanted.

    Args:
        model: That reads them.
        data: All batches.
        examples: How many examples they hold.
        mean_length: Tokens of an average one.
        wanted: Tokens.
        longest: Of texts without padding, only so many tokens from the beginning.
    """
    each = mean_length if longest is None else min(mean_length, longest)
    step = max(1, round(examples * each / wanted))
    batches: list[Mapping[str, Any]] = []
    seen = 0
    for batch in data:
        inputs = base_inputs(model, batch)
        size = len(next(iter(inputs.values())))
        rows = torch.tensor(range(-seen % step, size, step), dtype=torch.int64)
        seen += size
        if len(rows):
            batches.append(_part_of(model, batch, inputs, rows, longest))
    require_batches(len(batches))
    return batches


def _part_of(
    model: PreTrainedModel, batch: Mapping[str, Any], inputs: Mapping[str, Tensor], rows: Tensor, longest: int | None
) -> dict[str, Any]:
    """Some examples of a batch; of texts without padding, which may be cut short, only the beginnings if wanted."""
    examples, ids = len(next(iter(inputs.values()))), inputs.get("input_ids")
    cut = longest is not None and ids is not None and bool(seen_tokens(model, inputs).all())
    length = ids.shape[1] if cut and ids is not None else None

    def part(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        found = value[rows] if value.ndim and len(value) == examples else value
        return found[:, :longest] if found.ndim > 1 and found.shape[1] == length else found

    return {name: part(value) for name, value in batch.items()}


def falls(divergences: Mapping[int, float]) -> list[float]:
    """By how much a divergence falls with each unit, on its lower convex hull over the sizes at which it is known.

    Args:
        divergences: Kept units -> divergence; 0 and all units are among them.

    Returns:
        [units], non-increasing and not negative.

    Example:
        >>> falls({0: 9.0, 2: 1.0, 4: 0.0})
        [4.0, 4.0, 0.5, 0.5]
    """
    hull: list[tuple[int, float]] = []
    lowest = math.inf
    for kept, value in sorted(divergences.items()):
        # A larger size that happens to be further away than a smaller one is no reason to keep less.
        lowest = min(lowest, value)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (kept, lowest)):
            hull.pop()
        hull.append((kept, lowest))
    return [max(0.0, -_slope(one, other)) for one, other in itertools.pairwise(hull) for _ in range(other[0] - one[0])]


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
