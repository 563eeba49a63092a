"""Chooses between budgets by cutting all sublayers of a model at once.

The other sublayers make up for one that is cut alone. Where many lose heads together, the loss exceeds the sum of the
single losses. So the budget that single cuts suggest is compared with budgets that keep more heads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.data_needs import Data
from hf_compress.core.modes import evaluating
from hf_compress.core.moments import SecondMoments
from hf_compress.core.processes import added_up
from hf_compress.core.surgery import unit_columns
from hf_compress.methods.structured_pruning.allocation import UnitKind
from hf_compress.methods.structured_pruning.correction import output_projection
from hf_compress.methods.structured_pruning.divergence import (
    Answers,
    Distances,
    cut_output_,
    some_examples,
    vocabulary_of,
)
from hf_compress.methods.structured_pruning.selection import Ranking


logger = logging.getLogger(__name__)

# What the priorities of heads are multiplied by; infinity: all heads stay.
FACTORS = (1.0, 4.0, math.inf)
# Divergences that differ by less than this share count as equal, and then more heads stay: models that are cut at once
# do not show how the loss of heads grows where sublayers are fitted one after the other.
_MARGIN = 0.1
# Live tokens that are read, in whole examples: attention over long distances shows there only.
_TOKENS = 2048
# Numbers in the outputs that are compared; of a large vocabulary, not every token's.
_NUMBERS = 2**25

Sizes = Mapping[tuple[int, UnitKind], int]


@torch.no_grad()
def nearest_sizes(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    rankings: Mapping[tuple[int, UnitKind], Ranking],
    moments: Mapping[tuple[int, UnitKind], SecondMoments],
    data: Data,
    mean_length: float,
    sizes_with: Callable[[float], Sizes],
) -> Sizes:
    """The sizes of sublayers with which a model's outputs stay nearest to those of the dense one.

    Args:
        model, layers, rankings, moments, data, mean_length: As for `divergence_priorities`.
        sizes_with: What a factor of `FACTORS` gives; raises `ValueError` if it cannot meet the budget.

    Returns:
        What the best factor gives; the largest one of those whose divergence is within a tenth of the smallest.

    Raises:
        ValueError: If the budget cannot be met.
    """
    candidates: dict[float, Sizes] = {FACTORS[0]: sizes_with(FACTORS[0])}
    for factor in FACTORS[1:]:
        # Where all heads stay, the rest may not fit.
        with suppress(ValueError):
            sizes = sizes_with(factor)
            if sizes not in candidates.values():
                candidates[factor] = sizes
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    examples = next(iter(moments.values())).num_rows / mean_length
    answers = Answers(model, max(1, math.ceil(_TOKENS * vocabulary_of(model) / _NUMBERS)))
    distances = Distances(len(candidates), model.device)
    outs = {key: output_projection(layers[key[0]], key[1]) for key in rankings}
    intact = {key: out.weight.detach().clone() for key, out in outs.items()}
    with evaluating(model), added_up(distances):
        batches = some_examples(model, data, examples, mean_length, _TOKENS)
        dense = [answers(batch) for batch in batches]
        distances.count(dense, answers.classifies)
        for trial, sizes in enumerate(candidates.values()):
            try:
                for key, ranking in rankings.items():
                    if sizes[key] < len(ranking.order):
                        size = layers[key[0]].unit_size if key[1] == "heads" else 1
                        gram = moments[key].gram
                        columns = unit_columns(sorted(ranking.order[: sizes[key]]), size).to(gram.device)
                        cut_output_(outs[key], intact[key], gram, columns)
                for rows, batch in zip(dense, batches, strict=True):
                    distances.add(trial, rows, answers(batch), answers.classifies)
            finally:
                for key, out in outs.items():
                    out.weight.copy_(intact[key])
    found = dict(zip(candidates, distances.means(), strict=True))
    # Of a model that hardly moved, rounding can make it a little less than nothing.
    nearest = min(found.values())
    best = max(factor for factor, apart in found.items() if apart <= nearest + _MARGIN * abs(nearest))
    logger.info("Divergence with heads weighed by a factor: %s; %s is taken.", found, best)
    return candidates[best]
