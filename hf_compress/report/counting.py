"""Counts what models cost and how large their layers are: of models of transformers and of exported ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from hf_compress.api import rebuild
from hf_compress.core.architectures import ARCHITECTURES, TransformerLayer, layers_of
from hf_compress.core.batches import base_inputs, seen_tokens
from hf_compress.core.cost import Cost, CountsItself, count_cost, count_size, layer_macs
from hf_compress.core.exported import ExportedModel
from hf_compress.core.forward_state import carries_state
from hf_compress.report.quality import Measured
from hf_compress.tasks.inputs import padded_batch, row_lengths
from hf_compress.tasks.task import Batch


logger = logging.getLogger(__name__)


def shapes_of(model: PreTrainedModel | ExportedModel) -> PreTrainedModel:
    """The modules whose sizes are counted: the model itself; of an exported one the original's, without weights."""
    if not isinstance(model, ExportedModel):
        return model
    assert isinstance(model.config, PretrainedConfig)
    kind = getattr(transformers, str(model.facts.get("model")), None)
    with torch.device("meta"):
        empty: PreTrainedModel = (kind or AutoModelForSequenceClassification.from_config)(model.config)
    return rebuild(empty)


def counted_layers(model: PreTrainedModel, name: str) -> list[TransformerLayer]:
    """The layers of a model; none, with a warning, where this package does not know its architecture."""
    if isinstance(model, CountsItself):
        return []
    try:
        return layers_of(model, packed=True)
    except ValueError as error:
        logger.warning("The arithmetic of %s is not counted: %s", name, error)
        return []


def mean_length(measured: Measured, shapes: PreTrainedModel) -> float:
    """Tokens that the layers see of a row, in the mean."""
    if "input_ids" in measured.rows.column_names or shapes.config.model_type not in ARCHITECTURES:
        return sum(row_lengths(measured.rows)) / len(measured.rows)
    # Images have one size, and one of them has no padding.
    batch = padded_batch(measured.rows, [0], measured.processor)
    return float(seen_tokens(shapes, base_inputs(shapes, batch)).shape[1])


def cost_of(
    model: PreTrainedModel | ExportedModel,
    shapes: PreTrainedModel,
    layers: list[TransformerLayer],
    seq_len: float,
    data: list[Batch] | None,
    lengths: Iterable[float],
) -> Cost:
    """Size and arithmetic of a model.

    Args:
        model: Of transformers, or an exported one.
        shapes: Of `shapes_of`.
        layers: Of `shapes`; empty where they are not known.
        seq_len: Tokens of the sequence whose multiply-accumulates are counted.
        data: Batches to count on; None: `seq_len` is.
        lengths: Tokens of each row of the data, for exported models.

    Returns:
        The cost. The multiply-accumulates of an exported model that drops tokens are not counted: only the original
        can tell what it drops.
    """
    if isinstance(model, ExportedModel):
        size = model.facts["size"]
        known = not carries_state(shapes)
        by_layer = _macs(shapes, layers, [seq_len] if data is None else list(lengths)) if known else []
        return Cost(
            params=size["params"],
            nonzero_params=size["nonzero_params"],
            macs=sum(by_layer) if by_layer else None,
            bytes=model.num_bytes(),
            macs_by_layer=by_layer,
        )
    if layers or isinstance(model, CountsItself):
        return count_cost(model, seq_len, data=data)
    size = count_size(model)
    return Cost(params=size["params"], nonzero_params=size["nonzero_params"], macs=None, bytes=size["bytes"])


def _macs(model: PreTrainedModel, layers: list[TransformerLayer], lengths: list[float]) -> list[float]:
    """Mean multiply-accumulates of each layer over sequences of these lengths, from shapes alone."""
    if isinstance(model, CountsItself):
        by_length = [model.macs_by_layer(length) for length in lengths]
    else:
        by_length = [[float(layer_macs(layer, length)) for layer in layers] for length in lengths]
    return [sum(layer) / len(lengths) for layer in zip(*by_length, strict=True)]
