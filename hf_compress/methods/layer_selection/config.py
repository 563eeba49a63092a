"""The config of a model that has some layers of a deeper one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_compress.core.method import MethodConfig
from hf_compress.methods.layer_selection.spread import even_layers


@dataclass(kw_only=True)
class LayerSelectionConfig(MethodConfig):
    """Some layers of a model, in their order, with its embeddings and head; all other layers are dropped.

    Args:
        num_layers: How many layers stay, fewer than the model has. Left out: half of them, rounded up, or as many as
            `layers` lists.
        layers: Which layers stay. `even`: the first, the last and evenly spread ones between (of 12 layers, 6 are 0 2
            4 7 9 11; a single one is the last); `first`: the lowest ones; `last`: the highest ones; or their indices,
            counted from 0, in ascending order.
        kept_layers: Filled in by `compress`: the indices that the layers had in the deeper model.

    Source:
        Sanh et al. 2019 (arXiv 1910.01108), section 3: the student starts with one layer out of two.

    Example:
        >>> LayerSelectionConfig(layers=[0, 5, 5])
        Traceback (most recent call last):
            ...
        ValueError: layers must be ascending indices from 0, got [0, 5, 5].
    """

    num_layers: int | None = None
    layers: Literal["even", "first", "last"] | list[int] = "even"
    kept_layers: list[int] | None = field(default=None, metadata={"output": True})

    def check(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}.")
        if not isinstance(self.layers, str):
            if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be ascending indices from 0, got {list(self.layers)}.")
            if self.num_layers not in (None, len(self.layers)):
                raise ValueError(
                    f"num_layers must be {len(self.layers)}, the number of layers that are listed, got "
                    f"{self.num_layers}. Leave it out."
                )

    def chosen_of(self, total: int) -> list[int]:
        """The indices of the layers that stay in a model.

        Args:
            total: How many layers the model has.

        Raises:
            ValueError: If it has no such layers, or would keep all of them.
        """
        if not isinstance(self.layers, str):
            if self.layers[-1] >= total:
                raise ValueError(
                    f"layers must be indices of the model's layers 0..{total - 1}, got {self.layers[-1]}."
                )
            chosen = list(self.layers)
        else:
            number = (total + 1) // 2 if self.num_layers is None else self.num_layers
            whole = list(range(total))
            chosen = {"even": even_layers(total, number), "first": whole[:number], "last": whole[-number:]}[
                self.layers
            ]
        if len(chosen) >= total:
            raise ValueError(
                f"num_layers must be smaller than the number of the model's layers, {total}, got "
                f"{self.num_layers or len(chosen)}."
            )
        return chosen
