"""Fits a cut sublayer to the residual stream of the dense model behind it, instead of to its own output.

The errors of the layers before a sublayer arrive in its input and in the residual that its output is added to. The
target of its output projection is residual plus output in the dense model, minus the residual as it is now.

Letters: B batch, S padded length, N live tokens, D hidden, W columns of the projection's input, k kept columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.calibration import live_rows
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import first_of
from hf_compress.core.moments import PairedMoments, SecondMoments
from hf_compress.core.processes import added_up, place_in_data
from hf_compress.core.projections import NEURON_ROLES, Projection
from hf_compress.core.watching import Stop, watched
from hf_compress.methods.structured_pruning.allocation import UNIT_KINDS, UnitKind
from hf_compress.methods.structured_pruning.correction import output_projection


# One sequence of so many is held back: the strength of the fit is chosen on it.
_HELD_BACK = 5
# Strengths of the pull towards the sublayer's own output, as fractions of the mean diagonal of the Gram matrix.
_PULLS = (0.0, 0.01, 0.1, 1.0, 10.0, math.inf)
_JITTER = 1e-10
# A mean square of hidden states, where they are all zero.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Seen:
    """What one pass of a layer over one batch shows of a sublayer, live tokens only.

    Args:
        inputs: [N, W], the input of the output projection.
        residual: [N, D], what the sublayer's output is added to.
        output: [N, D], the output, with its bias.
        places: [N] int64, the place in its batch of the sequence that each token belongs to.
    """

    inputs: Tensor
    residual: Tensor
    output: Tensor
    places: Tensor


def seen_of(
    layer: TransformerLayer, kinds: Sequence[UnitKind], masks: list[Tensor], run: Callable[[], Tensor], pre_norm: bool
) -> dict[UnitKind, Seen]:
    """Run a layer on one batch and look at its sublayers.

    Args:
        layer: The layer.
        kinds: The sublayers to look at; the layer ends behind the attention if only that is asked for.
        masks: Those of the batch.
        run: Runs the layer on the batch.
        pre_norm: Whether the sublayers normalise their input. The residual of the feed-forward part is then the
            layer's output minus that of the projection; otherwise it is the input of the feed-forward part.
    """
    found: dict[tuple[UnitKind, str], Tensor] = {}

    def keep(kind: UnitKind, what: str, last: bool = False) -> Callable[..., None]:
        def look(args: tuple[Any, ...], more: Any) -> None:
            value = first_of(more) if what == "output" else (args[0] if args else more["hidden_states"])
            found[kind, what] = value
            if last:
                raise Stop

        return look

    before: list[tuple[nn.Module, Any]] = [(layer.module, keep("heads", "residual"))]
    after: list[tuple[nn.Module, Any]] = []
    for kind in kinds:
        out = output_projection(layer, kind).module
        before.append((out, keep(kind, "inputs")))
        after.append((out, keep(kind, "output", last=kinds == ["heads"])))
    if "neurons" in kinds and not pre_norm:
        before.append((_first_neurons(layer), keep("neurons", "residual")))
    with watched(before=before, after=after):
        end = run()
        if "neurons" in kinds and pre_norm:
            found["neurons", "residual"] = end - found["neurons", "output"].reshape(end.shape)
    states = found["heads", "residual"]
    places = torch.arange(len(states), device=states.device)[:, None, None].expand(*states.shape[:-1], 1)

    def live(what: str, values: Tensor) -> Tensor:
        return live_rows(f"layer {layer.index} {what}", values, masks, may_be_packed=False)

    return {
        kind: Seen(
            inputs=live("inputs", found[kind, "inputs"]),
            residual=live("residual", found[kind, "residual"]),
            output=live("output", found[kind, "output"]),
            places=live("places", places).flatten(),
        )
        for kind in kinds
    }


def _first_neurons(layer: TransformerLayer) -> nn.Module:
    return next(
        layer.modules[path] for path, roles in layer.architecture.projections.items() if roles[0] in NEURON_ROLES
    )


class Moments:
    """What is known of an output projection and its targets.

    Args:
        out: The projection.

    Attributes:
        inputs: Moments of its inputs, by which units are chosen.
        fit: Moments of inputs and targets over the sequences that weights are fitted to; the last column of the inputs
            is that of the intercept. Each token is divided by the root mean square of the dense model's residual
            stream: the next normalisation does the same, and a few tokens with hidden states of a thousand times the
            usual size, which many decoders have, would otherwise decide the fit.
        held: The same of every fifth sequence, which is held back.
    """

    def __init__(self, out: Projection) -> None:
        width, device = out.in_features, out.weight.device
        self.inputs = SecondMoments(width, device)
        self.fit, self.held = (PairedMoments(out.out_features, width + 1, device) for _ in range(2))

    def update(self, seen: Seen, sums: Tensor, held_back: Tensor) -> None:
        """Add tokens.

        Args:
            seen: Of the layer as it is now.
            sums: [N, D], residual plus output in the dense model.
            held_back: [N] bool.
        """
        self.inputs.update(seen.inputs)
        scale = sums.float().square().mean(1, keepdim=True).clamp(min=_SMALLEST).rsqrt()
        targets, inputs = (sums - seen.residual) * scale, torch.cat([seen.inputs * scale, scale], 1)
        for moments, rows in ((self.fit, ~held_back), (self.held, held_back)):
            moments.update(targets[rows], inputs[rows])


class DenseSums:
    """Residual plus output of each sublayer of the current layer in the dense model, batch by batch.

    Args:
        walk: At a layer that nothing has changed yet; it carries two streams.
        layer: That layer.
        pre_norm: Whether its sublayers normalise their input.
    """

    def __init__(self, walk: LayerWalk, layer: TransformerLayer, pre_norm: bool) -> None:
        self._walk, self._layer, self._pre_norm = walk, layer, pre_norm
        dense = TransformerLayer(layer.index, walk.dense_layer, layer.architecture)
        self._sums: dict[UnitKind, list[Tensor]] = {kind: [] for kind in UNIT_KINDS}
        for masks, run in walk.runs(dense=True):
            for kind, seen in seen_of(dense, UNIT_KINDS, masks, run, pre_norm).items():
                self._sums[kind].append(seen.residual + seen.output)

    @torch.no_grad()
    def moments(self, kind: UnitKind) -> Moments:
        """Moments of the input of one output projection, as its layer is now, with its targets.

        Raises:
            ValueError: If there are too few sequences to hold one back.
        """
        out = output_projection(self._layer, kind)
        found = Moments(out)
        with added_up(found.inputs, found.fit, found.held):
            for number, (masks, run) in enumerate(self._walk.runs()):
                seen = seen_of(self._layer, [kind], masks, run, self._pre_norm)[kind]
                # Batches are counted over all processes, so that their number does not decide what is held back.
                held_back = (place_in_data(number) + seen.places) % _HELD_BACK == _HELD_BACK - 1
                found.update(seen, self._sums[kind][number], held_back)
        if not found.held.own.num_rows:
            raise ValueError(
                f"target='dense' holds back one sequence of {_HELD_BACK} to choose how far weights may move, got "
                f"too few sequences. Give at least {_HELD_BACK}, or use target='self'."
            )
        return found


@dataclass(frozen=True)
class Fit:
    """A new weight for the kept columns of an output projection.

    Args:
        weight: [D, k] float64.
        bias: [D] float64; None if the projection has none.
        pull: The strength that was chosen, infinity for none of the fit.
    """

    weight: Tensor
    bias: Tensor | None
    pull: float


class Normal:
    """The least-squares problem of a projection's columns A and targets Y, with an intercept or without.

    Args:
        parts: Moments of the rows, as `DenseSums` gives them.
        intercept: Whether the projection has a bias.
    """

    def __init__(self, parts: Sequence[PairedMoments], intercept: bool) -> None:
        gram = torch.stack([part.own.gram for part in parts]).sum(0) if len(parts) > 1 else parts[0].own.gram
        cross = sum((part.cross for part in parts[1:]), parts[0].cross).T
        self.gram, self.cross = gram[:-1, :-1], cross[:-1]
        self.energy = sum(float(part.dense_energy) for part in parts)
        # Rows, each as often as its scale squared says.
        self.rows = float(gram[-1, -1])
        self._means: tuple[Tensor, Tensor] | None = None
        if intercept and self.rows:
            inputs, targets = gram[-1, :-1] / self.rows, cross[-1] / self.rows
            self._means = inputs, targets
            self.gram = self.gram - self.rows * torch.outer(inputs, inputs)
            self.cross = self.cross - self.rows * torch.outer(inputs, targets)
            self.energy -= self.rows * float(targets.square().sum())

    def solved(self, columns: Tensor, own: Tensor, pull: float) -> Tensor:
        """[D, k]: the weight that comes nearest to the targets and to `own`, [D, k], with the given strength."""
        if math.isinf(pull) or not len(columns):
            return own
        gram = self.gram[columns][:, columns]
        strength = pull * float(gram.diagonal().mean())
        # Dependent columns would make the matrix singular.
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * strength
        damped.diagonal().add_(_JITTER * float(gram.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            # Inputs that depend on each other, or are always the same, allow no fit of this strength.
            return own
        return torch.cholesky_solve(self.cross[columns] + strength * own.T, factor).T

    def bias(self, columns: Tensor, weight: Tensor) -> Tensor | None:
        """[D]: the intercept that belongs to a weight."""
        return None if self._means is None else self._means[1] - weight @ self._means[0][columns]

    def error(self, columns: Tensor, weight: Tensor) -> float:
        """The squared error of a weight [D, k] with the best intercept."""
        gram, cross = self.gram[columns][:, columns], self.cross[columns]
        return float((weight * (weight @ gram)).sum() - 2 * (weight.T * cross).sum()) + self.energy


def fitted(out: Projection, columns: Tensor, own: Tensor, moments: Moments) -> Fit:
    """Fit the kept columns of an output projection to the dense model.

    Ridge regression towards the weight that repeats the sublayer's own output; how strongly it pulls is chosen on the
    sequences that were held back, and the weight is then fitted to all of them. Where no strength beats that weight
    itself, only the bias is fitted.

    Args:
        out: The projection, not cut yet.
        columns: [k] int64, ascending indices of the columns that stay.
        own: [D, k] float64, the weight for them that repeats the sublayer's own output.
        moments: Of the projection.

    Raises:
        ValueError: If the moments are not finite.
    """
    intercept = out.bias is not None
    everything, part, rest = (
        Normal(parts, intercept) for parts in ([moments.fit, moments.held], [moments.fit], [moments.held])
    )
    pull = math.inf
    if rest.rows and part.rows:
        errors = {pull: rest.error(columns, part.solved(columns, own, pull)) for pull in _PULLS}
        pull = min(errors, key=lambda tried: (errors[tried], -tried))
    weight = everything.solved(columns, own, pull)
    if not torch.isfinite(weight).all():
        raise ValueError("The fit to the dense model is not finite. Give more calibration data, or use target='self'.")
    return Fit(weight, everything.bias(columns, weight), pull)
