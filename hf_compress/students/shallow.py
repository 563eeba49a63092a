"""A shallower copy of a teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from hf_compress.api import compress
from hf_compress.methods.layer_selection import LayerSelectionConfig


def from_teacher(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    layers: Literal["even", "first", "last"] | Sequence[int] = "even",
) -> PreTrainedModel:
    """Make a student out of some layers of a teacher, with its embeddings and head.

    Args:
        teacher: A dense model of a supported architecture. It is left as it is.
        num_layers: How many layers the student has, fewer than the teacher. None: half of them, rounded up, or as
            many as `layers` lists.
        layers: Which layers. `even`: the first, the last and evenly spread ones between (of 12 layers, 6 are 0, 2, 4,
            7, 9, 11; a single one is the last); `first`: the lowest ones; `last`: the highest ones; or their ascending
            indices, counted from 0.

    Returns:
        A copy on the teacher's device, recorded as the step `layer_selection`. Saved, it opens with plain
        `from_pretrained`; after `to_plain` also without this package.

    Raises:
        ValueError: If the teacher's architecture is not supported, it went through a method already, or it has no such
            layers.

    Source:
        Sanh et al. 2019 (arXiv 1910.01108), section 3.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
        >>> from_teacher(BertModel(tiny), 2).config.num_hidden_layers
        2
    """
    chosen = layers if isinstance(layers, str) else list(layers)
    config = LayerSelectionConfig(num_layers=num_layers, layers=chosen)
    return compress(copy.deepcopy(teacher), config)
