"""Says where the weights of layers are while a walk visits them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Residency(Protocol):
    """Brings the weights of one layer at a time into memory, and remembers how far a walk got."""

    @property
    def complete(self) -> bool:
        """Whether the weights of all layers are in the model all the time."""

    def resumed(self) -> tuple[int, list[Tensor]]:
        """The first layer to visit, and its inputs as `leave` got them; 0 and nothing: a walk from the start."""

    def enter(self, index: int) -> None:
        """Load the weights of a layer."""

    def leave(self, index: int, states: list[Tensor]) -> None:
        """Give the weights of a layer away.

        Args:
            index: Of the layer.
            states: The inputs of the next layer, batch by batch; of two streams, the changed model's before the dense
                one's. None behind the last layer.
        """


class InMemory:
    """All weights are in the model."""

    complete = True

    def resumed(self) -> tuple[int, list[Tensor]]:
        return 0, []

    def enter(self, index: int) -> None:
        """Nothing is missing."""

    def leave(self, index: int, states: list[Tensor]) -> None:
        """Everything stays."""
