"""Measures the inputs of the output projections of an intact model, and ranks its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.batches import seen_tokens
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.data_needs import Data
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import NotWalkable
from hf_compress.core.moments import SecondMoments
from hf_compress.core.processes import added_up
from hf_compress.core.projections import Projection
from hf_compress.methods.structured_pruning.allocation import UnitKind
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import gram_matrix, output_projections, require_tokens
from hf_compress.methods.structured_pruning.selection import Ranking, rank


class Lengths:
    """Counts the examples and the real tokens of the batches that it is called with."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Examples and tokens.
        self._counts = torch.zeros(2, dtype=torch.float64)

    def __call__(self, inputs: Mapping[str, Any]) -> None:
        live = seen_tokens(self._model, inputs)
        self._counts += torch.tensor([len(live), int(live.sum())])

    def sums(self) -> list[Tensor]:
        return [self._counts]

    @property
    def mean(self) -> float:
        examples, tokens = self._counts.tolist()
        return float(tokens / examples)


@dataclass(frozen=True)
class Measured:
    """What a pass over the examples says of the intact model.

    Args:
        moments: (layer index, kind) -> those of the input of the output projection.
        rankings: The same -> all units of that sublayer.
        mean_length: Of the examples, in tokens.
        walk: That goes on through the layers; None where everything is taken from the intact model.
        generator: Of the selection `random`, after these rankings.
    """

    moments: dict[tuple[int, UnitKind], SecondMoments]
    rankings: dict[tuple[int, UnitKind], Ranking]
    mean_length: float
    walk: LayerWalk | None
    generator: torch.Generator


def measure_and_rank(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], config: StructuredPruningConfig, data: Data
) -> Measured:
    """Measure the intact model and rank the units of each sublayer; the target of the config decides nothing.

    Raises:
        ValueError: If there are too few tokens, or `order="sequential"` is not possible for the model.
    """
    moments = {key: empty_moments(out) for key, out in output_projections(layers).items()}
    lengths = Lengths(model)
    with added_up(lengths):
        walk = _measure_intact(model, layers, config, data, moments, lengths)
    require_tokens(layers, config, min(measured.num_rows for measured in moments.values()))
    generator = torch.Generator().manual_seed(config.seed)
    rankings = {
        (index, kind): rank(layers[index], kind, gram_matrix(measured, config.center), config.selection, generator)
        for (index, kind), measured in moments.items()
    }
    return Measured(moments, rankings, lengths.mean, walk, generator)


def empty_moments(out: Projection) -> SecondMoments:
    return SecondMoments(out.in_features, out.weight.device)


def _measure_intact(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    data: Data,
    moments: Mapping[tuple[int, UnitKind], SecondMoments],
    lengths: Lengths,
) -> LayerWalk | None:
    """Measure the intact model; where the config wants one, return the walk that visits its layers in order."""
    modules = {key: out.module for key, out in output_projections(layers).items()}
    if not config.walks:
        collect_inputs(model, modules, moments, data, lengths, "layer statistics")
        return None
    try:
        within = [layer.module for layer in layers]
        return LayerWalk(
            model, within, data, modules=modules, statistics=moments, on_batch=lengths,
            two_streams=config.target == "dense",
        )  # fmt: skip
    except NotWalkable as error:
        asked, instead = (
            ("target='dense'", "target='self'")
            if config.target == "dense"
            else ("order='sequential'", "order='one_shot'")
        )
        raise ValueError(f"{asked} cannot be used with {model.config.model_type}: {error}. Use {instead}.") from error
