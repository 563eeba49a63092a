"""What a method gets to compress a model whose layers are in memory one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.data_needs import Data
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import NotWalkable
from hf_compress.core.layer_store import LayerStore
from hf_compress.core.residency import Residency
from hf_compress.core.unfinished import Unfinished


class _StoredLayers:
    """The residency of a walk whose layers are in a store.

    Args:
        store: Has the layers.
        unfinished: Remembers how far the walk got.
        name: Of the walk.
        changes: Whether the walk changes layers; otherwise nothing is written of them.
    """

    complete = False

    def __init__(self, store: LayerStore, unfinished: Unfinished, name: str, changes: bool) -> None:
        self._store, self._unfinished, self._name, self._changes = store, unfinished, name, changes

    def resumed(self) -> tuple[int, list[Tensor]]:
        position, states = self._unfinished.kept(self._name)
        for index in range(position if self._changes else 0):
            if not self._store.file(index).is_file():
                raise ValueError(
                    f"{str(self._store.file(index))!r} is missing, the result of layer {index}: remove its folder to "
                    "begin anew."
                )
        return position, states

    def enter(self, index: int) -> None:
        self._store.load_(index)

    def leave(self, index: int, states: list[Tensor]) -> None:
        # The layer first: the position says that it is there.
        if self._changes:
            self._store.write(index)
        self._unfinished.keep(self._name, index + 1, states)
        self._store.drop_(index, done=self._changes)


class LayerVisit:
    """Yields the index of each layer while it is in memory.

    Args:
        residency: Has the layers.
        number: How many there are.
    """

    def __init__(self, residency: Residency, number: int) -> None:
        self._residency, self._number = residency, number
        self.first = residency.resumed()[0]

    def __iter__(self) -> Iterator[int]:
        for index in range(self.first, self._number):
            self._residency.enter(index)
            yield index
            self._residency.leave(index, [])


class LayerPasses:
    """Walks through the layers of a model that is never in memory as a whole.

    Each walk has a name. A program that was killed and runs again gets a walk that begins at the layer that the old
    one had reached, and what was noted until then.

    Args:
        model: All but its layers is in memory.
        layers: Those of the model, on the meta device.
        batches: Calibration data; None for methods that read none.
        store: Has the weights of the layers.
        unfinished: Remembers how far walks got.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[TransformerLayer],
        batches: Data | None,
        store: LayerStore,
        unfinished: Unfinished,
    ) -> None:
        self.model, self.layers, self._batches = model, layers, batches
        self._store, self._unfinished = store, unfinished

    def walk(self, name: str, *, changes: bool, **settings: Any) -> LayerWalk:
        """Make a walk through the layers as the model has them.

        Args:
            name: Of this walk; another one for each.
            changes: Whether the layers, as the walk leaves them, are the result. One walk of a method does so.
            settings: Further arguments of `LayerWalk`.

        Raises:
            ValueError: If the layers of the model do not run one after the other, or the data is empty.
        """
        assert self._batches is not None
        try:
            return LayerWalk(
                self.model,
                [layer.module for layer in self.layers],
                self._batches,
                residency=_StoredLayers(self._store, self._unfinished, name, changes),
                **settings,
            )
        except NotWalkable as error:
            raise ValueError(
                f"{self.model.config.model_type} cannot be compressed layer by layer: {error}. Open the model whole, "
                "and use compress."
            ) from error

    def visit(self, name: str) -> LayerVisit:
        """Go through the layers for a change that needs no data; what each is afterwards is the result."""
        return LayerVisit(_StoredLayers(self._store, self._unfinished, name, changes=True), len(self.layers))

    def note(self, name: str, value: Any) -> None:
        """Keep a value of JSON under a name. Notes on a layer belong before the walk goes on."""
        self._unfinished.note(name, value)

    def noted(self, name: str) -> Any:
        """What was noted under a name; None if nothing was."""
        return self._unfinished.noted(name)
