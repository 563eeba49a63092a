"""Normalisations of sublayers that have nothing left, folded into the normalisation before them.

Where a layer normalises after each sublayer, one without heads or neurons adds its bias and normalises a second time
what has just been normalised. That stretches and shifts each channel by nearly the same amount for every token, which
the normalisation before can do with its own weights. Nothing of the sublayer is left then.

Letters: N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import architecture_of, layers_of
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.data_needs import Data
from hf_compress.core.moments import device_of_doubles
from hf_compress.core.surgery import renewed


# Tokens that a line is drawn through.
_LEAST = 100


@dataclass(frozen=True)
class Fold:
    """A normalisation that can go.

    Args:
        layer: The layer that it is in.
        path: Where it is in the layer.
        projection: The output projection of its sublayer, which has no inputs.
        before: The normalisation whose output the sublayer reads.
    """

    layer: nn.Module
    path: str
    projection: nn.Linear | Conv1D
    before: nn.LayerNorm

    @property
    def norm(self) -> nn.LayerNorm:
        found = self.layer.get_submodule(self.path)
        assert isinstance(found, nn.LayerNorm)
        return found

    def remove_(self) -> None:
        """Leave nothing of the sublayer but what it reads."""
        parent, _, name = self.path.rpartition(".")
        setattr(self.layer.get_submodule(parent), name, nn.Identity())
        self.projection.register_parameter("bias", None)


def require_foldable(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the architecture is one whose normalisations can be folded."""
    # Between attention and the feed-forward part lies another normalisation there.
    crossed = getattr(model.config, "add_cross_attention", False)
    if architecture_of(model).norms is None or crossed:
        raise ValueError(
            f"fold_norms must be false for {model.config.model_type}: it is for encoders that normalise after each "
            "sublayer, as BERT, DistilBERT and MPNet do, without cross-attention."
        )


def folds_of(model: PreTrainedModel) -> list[Fold]:
    """The normalisations of a model that can go, in the order in which they run."""
    row = architecture_of(model)
    assert row.norms is not None
    first = model.base_model.get_submodule(row.norms.first)
    # A projection between embeddings and layers would keep the two apart.
    before = None if hasattr(model.base_model, "embeddings_project") else first
    found = []
    for layer in layers_of(model, adapted=True):
        sublayers = (
            (row.norms.attention, layer.num_units, layer.attention_out.module),
            (row.norms.ffn, layer.num_neurons, layer.ffn_out.module),
        )
        for path, units, projection in sublayers:
            norm = layer.module.get_submodule(path)
            if isinstance(norm, nn.Identity):
                continue
            if not units and isinstance(before, nn.LayerNorm):
                found.append(Fold(layer.module, path, projection, before))
            else:
                before = norm
    return found


class _Line:
    """The straight line through what a normalisation makes of each channel: least squares over the live tokens.

    Args:
        norm: Of D channels.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._norm = norm
        device = device_of_doubles(norm.weight.device)
        # Tokens; and of each channel the sums of x, y, x^2 and x y.
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = torch.zeros(4, norm.weight.shape[0], dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        norm = self._norm
        # Not the module: it is what is being watched.
        after = nn.functional.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x, y = rows.to(self._sums), after.to(self._sums)
        self._count += len(x)
        self._sums += torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])

    def sums(self) -> Iterable[Tensor]:
        return [self._count, self._sums]

    def slope_and_shift(self) -> tuple[Tensor, Tensor]:
        """[D] and [D], float64. A channel that never changes is only shifted.

        Raises:
            ValueError: If there were too few tokens to draw a line through.
        """
        if self._count < _LEAST:
            raise ValueError(
                f"fold_norms needs at least {_LEAST} tokens of calibration data that are not padding, got "
                f"{int(self._count)}."
            )
        x, y, squares, products = self._sums / self._count
        spread = squares - x.square()
        moves = spread > 1e-12 * squares
        slope = torch.where(moves, (products - x * y) / torch.where(moves, spread, 1.0), 0.0)
        return slope, y - slope * x


@torch.no_grad()
def fold_norms_(model: PreTrainedModel, data: Data) -> None:
    """Fold the normalisations of empty sublayers into those before them.

    Args:
        model: Changed in place. Its outputs change a little: a normalisation divides each token by a number of its
            own, which becomes the same for all.
        data: Batches on which those lines are drawn; read once.

    Raises:
        ValueError: If the data hold too few tokens.
    """
    folds = folds_of(model)
    if not folds:
        return
    norms = {f"the normalisation {place}": fold.norm for place, fold in enumerate(folds)}
    lines = {name: _Line(norm) for name, norm in norms.items()}
    collect_inputs(model, norms, lines, data, description="normalisations")
    for fold, line in zip(folds, lines.values(), strict=True):
        slope, shift = line.slope_and_shift()
        weight, bias = (part.detach().to(slope) for part in (fold.before.weight, fold.before.bias))
        if fold.projection.bias is not None:
            bias = bias + fold.projection.bias.detach().to(slope)
        # New ones: a call that fails later gives the old ones back.
        fold.before.weight = renewed(fold.before.weight, weight * slope)
        fold.before.bias = renewed(fold.before.bias, slope * bias + shift)
    remove_(folds)


def remove_(folds: Sequence[Fold]) -> None:
    """Take normalisations out of a model or a skeleton whose weights have them folded in."""
    for fold in folds:
        fold.remove_()
