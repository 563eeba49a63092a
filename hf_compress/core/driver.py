"""Walks the layers of a model once, each with the inputs that the layers before it now compute.

One real forward pass of every batch records the arguments of each layer: masks, position embeddings, and whatever
else its model passes to it. From then on only the hidden states change, and each layer runs alone.

Letters: B batch, S padded length, N live tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.batches import base_inputs, token_masks
from hf_compress.core.calibration import Key, Statistic, feeding, run_base, with_progress
from hf_compress.core.data_needs import require_batches
from hf_compress.core.forward_state import carries_state
from hf_compress.core.layer_calls import LayerCall, LayerRecorder, NotWalkable, recorded_idle
from hf_compress.core.modes import evaluating
from hf_compress.core.moments import PairedMoments
from hf_compress.core.processes import added_up, all_told, first_told
from hf_compress.core.residency import InMemory, Residency


@dataclass
class _Batch:
    """One batch during the walk.

    Args:
        masks: The masks of its tokens, as `token_masks` gives them.
        calls: The arguments of the layers still to come; the last entry belongs to the current layer.
        states: [B, S, D], the input of the current layer.
        dense_states: [B, S, D], the same input in the untouched model; None if it is not carried.
        device: The device of the states in the model.
    """

    masks: list[Tensor]
    calls: list[LayerCall]
    states: Tensor
    dense_states: Tensor | None
    device: torch.device

    def resume(self, first: int, states: Iterator[Tensor], put_away: Callable[[Tensor], Tensor]) -> None:
        """Go on with a later layer and its inputs, those in the untouched model last."""
        del self.calls[len(self.calls) - first :]
        self.states = put_away(next(states).to(self.device))
        if self.dense_states is not None:
            self.dense_states = put_away(next(states).to(self.device))


class _Rows:
    """Keeps the rows of one batch unchanged."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        self.rows = rows


class _BesideDense:
    """Passes rows on together with those of the dense model for the same tokens."""

    def __init__(self, moments: PairedMoments, dense: _Rows) -> None:
        self._moments, self._dense = moments, dense

    def update(self, rows: Tensor) -> None:
        assert self._dense.rows is not None
        self._moments.update(self._dense.rows, rows)


class LayerWalk:
    """Visits the layers of a model from the first to the last, each with its inputs for all batches.

    Later layers see whatever is done to a layer while the walk is at it::

        walk = LayerWalk(model, layers, data)
        for index in walk:
            walk.observe({"out": module}, {"out": statistic})     # a module inside layers[index]
            ...                                                   # change layers[index]

    The data is read once, when the walk is made. The walk itself changes nothing of the model and leaves it in the
    mode it had. It can be walked once. Where several processes compress together, each walks with its share of the
    batches, and statistics are those of all.

    Args:
        model: Any transformers model, on the device it is on.
        layers: Modules of the base model that run once each, in this order, each on the output of the one before.
        data: Model-input dicts of tensors. Labels and arguments that the base model does not take are ignored.
        modules: Key -> module inside the layers. The first forward pass feeds their inputs, in the model as it is when
            the walk begins, to `statistics`.
        statistics: Key -> statistic, for the same keys.
        on_batch: Called with each batch (after the move).
        two_streams: Also carry the hidden states of the model as it is now, beside those of the compressed model.
            Needs twice the memory, and a copy of one layer.
        offload: Keep hidden states that are not in use in CPU memory, in the model's dtype.
        residency: Where the weights of the layers are. Unless they are all in the model, the first forward pass runs
            no layer, and feeds no statistic. None: in the model.

    Raises:
        NotWalkable: If the layers do not run in this way.
        ValueError: If the data is empty, lacks the model's main input, or drives a module to a non-finite input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        data: Iterable[Mapping[str, Any]],
        *,
        modules: Mapping[Key, nn.Module] | None = None,
        statistics: Mapping[Key, Statistic] | None = None,
        on_batch: Callable[[Mapping[str, Any]], None] | None = None,
        two_streams: bool = False,
        offload: bool = False,
        residency: Residency | None = None,
    ) -> None:
        self._layers, self._index, self._residency = list(layers), 0, residency or InMemory()
        self._drops_tokens = carries_state(model)
        if two_streams and self._drops_tokens:
            raise NotWalkable("layers drop tokens, and compression changes which tokens they drop")
        self._two_streams, self._offload = two_streams, offload
        # A copy of the current layer before anything changed it.
        self._dense_layer: nn.Module | None = None
        self._batches: list[_Batch] = []
        sequences = 0
        reason: str | None = None
        with torch.no_grad(), evaluating(model), added_up(*(statistics or {}).values()):
            try:
                for batch in with_progress(data, "layer inputs"):
                    inputs = base_inputs(model, batch)
                    if on_batch is not None:
                        on_batch(inputs)
                    masks, run = token_masks(model, inputs), partial(run_base, model, inputs)
                    if self._residency.complete:
                        recorder = LayerRecorder(self._layers)
                        feeder = feeding(modules or {}, statistics or {}, masks, self._drops_tokens, whole=True)
                        with recorder.recording(), feeder:
                            run()
                        found = recorder.finished()
                    else:
                        found = recorded_idle(self._layers, run)
                    self._batches.append(_recorded(masks, *found, self._put_away, two_streams))
                    sequences += len(self._batches[-1].states)
            except NotWalkable as error:
                reason = str(error)
            # One process may have no batch that shows it.
            if (reason := first_told(reason)) is not None:
                raise NotWalkable(reason)
        require_batches(len(self._batches))
        self.num_sequences = sum(all_told(sequences))
        # The layers before the first one to visit are changed already.
        self.first, states = self._residency.resumed()
        left = iter(states)
        for recorded in self._batches if states else ():
            recorded.resume(self.first, left, self._put_away)

    def _put_away(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu") if self._offload else tensor

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[int]:
        """Yield the index of each layer. Going on runs the current layer, as it is by then, for the last time."""
        for index in range(self.first, len(self._layers)):
            self._index = index
            self._residency.enter(index)
            if self._two_streams:
                self._dense_layer = copy.deepcopy(self._layers[index]).eval()
            yield index
            following = index + 1 < len(self._layers)
            if following:
                self._advance()
            self._dense_layer = None
            self._residency.leave(index, list(self._streams()) if following else [])

    def _streams(self) -> Iterator[Tensor]:
        for batch in self._batches:
            yield batch.states
            if batch.dense_states is not None:
                yield batch.dense_states

    def _run(self, layer: nn.Module, batch: _Batch, states: Tensor) -> Tensor:
        if not self._offload:
            return batch.calls[-1].run(layer, states)
        call = batch.calls[-1].mapped(lambda tensor: tensor.to(batch.device))
        return call.run(layer, states.to(batch.device))

    @torch.no_grad()
    def _advance(self) -> None:
        layer = self._layers[self._index]
        with evaluating(layer):
            for batch in self._batches:
                batch.states = self._put_away(self._run(layer, batch, batch.states))
                if self._dense_layer is not None and batch.dense_states is not None:
                    batch.dense_states = self._put_away(self._run(self._dense_layer, batch, batch.dense_states))
                batch.calls.pop()

    def runs(self, dense: bool = False) -> Iterator[tuple[list[Tensor], Callable[[], Tensor]]]:
        """Yield, for each batch, the masks of its tokens and a function that runs the current layer on its input.

        Args:
            dense: Run the untouched layer on its input in the untouched model, instead of the layer as it is now.

        Raises:
            ValueError: If `dense`, and the walk carries one stream only.
        """
        layer = self._layers[self._index] if not dense else self.dense_layer
        with torch.no_grad(), evaluating(layer):
            for batch in self._batches:
                states = batch.dense_states if dense else batch.states
                assert states is not None
                yield batch.masks, partial(self._run, layer, batch, states)

    @property
    def dense_layer(self) -> nn.Module:
        """A copy of the current layer as it was before the walk came to it.

        Raises:
            ValueError: If the walk carries one stream only.
        """
        if self._dense_layer is None:
            raise ValueError("The walk carries no dense stream. Make it with two_streams=True.")
        return self._dense_layer

    @torch.no_grad()
    def observe(
        self, modules: Mapping[Key, nn.Module], statistics: Mapping[Key, Statistic], repeated: bool = False
    ) -> None:
        """Feed the live-token inputs of some modules to statistics; each batch runs the layer up to the last of them.

        Args:
            modules: Key -> module inside the current layer.
            statistics: Key -> statistic, for the same keys.
            repeated: Run the layer to its end, because some modules run more than once in it.

        Raises:
            ValueError: If an input is not finite or not one row a token.
        """
        layer = self._layers[self._index]
        with evaluating(layer), added_up(*statistics.values()):
            for batch in self._batches:
                with feeding(modules, statistics, batch.masks, self._drops_tokens, whole=repeated):
                    self._run(layer, batch, batch.states)

    @torch.no_grad()
    def observe_both(self, moments: Mapping[str, PairedMoments]) -> None:
        """Feed the inputs of some modules in the dense and in the compressed model to cross moments, row by row.

        Args:
            moments: Name of a module inside the current layer -> the moments of its two inputs.

        Raises:
            ValueError: If the walk carries one stream only, or an input is not finite or not one row per token.
        """
        layer, dense_layer = self._layers[self._index], self.dense_layer
        with evaluating(layer), added_up(*moments.values()):
            for batch in self._batches:
                assert batch.dense_states is not None
                rows = {name: _Rows() for name in moments}
                with feeding(_named(dense_layer, moments), rows, batch.masks):
                    self._run(dense_layer, batch, batch.dense_states)
                pairs = {name: _BesideDense(moments[name], rows[name]) for name in moments}
                with feeding(_named(layer, moments), pairs, batch.masks):
                    self._run(layer, batch, batch.states)


def _recorded(
    masks: list[Tensor],
    calls: list[LayerCall],
    states: Tensor,
    put_away: Callable[[Tensor], Tensor],
    two_streams: bool,
) -> _Batch:
    # Layers share masks and position embeddings: each tensor is moved only once.
    away: dict[int, tuple[Tensor, Tensor]] = {}

    def put(tensor: Tensor) -> Tensor:
        return away.setdefault(id(tensor), (tensor, put_away(tensor)))[1]

    kept = [call.mapped(put) for call in reversed(calls)]
    own = put(states)
    return _Batch(masks, kept, own, own if two_streams else None, states.device)


def _named(layer: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    return {name: layer.get_submodule(name) for name in names}
