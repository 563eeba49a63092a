"""The description of an architecture: the fields of one row of the support table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from hf_compress.core.projections import Role


class PositionWork(NamedTuple):
    """The work of attention on embeddings of relative positions.

    Args:
        rows: Number of embeddings that take part, whatever the length of the input.
        projections: How many projections are applied to all of them, once in a forward pass.
        products: How many products of all tokens with all of them each head computes.
    """

    rows: int
    projections: int
    products: int


class Norms(NamedTuple):
    """Paths to the normalisations of an encoder that normalises the sum of each sublayer's input and output.

    Args:
        attention, ffn: From a layer to those after attention and after the feed-forward part.
        first: From the base model to the one whose output the first layer reads.
    """

    attention: str
    ffn: str
    first: str = "embeddings.LayerNorm"


@dataclass(frozen=True)
class Architecture:
    """The paths to the projections of models of one `model_type`, and the properties of their layers.

    Paths lead from one transformer layer to a submodule; dots separate attributes.

    Args:
        layers: Path from the base model to the `ModuleList` of layers.
        attention: Path to the module that splits heads.
        projections: Path of each module with projections -> their roles; a fused module has several, in the order of
            its outputs. Layouts that interleave the projections head by head are not supported.
        activation: Path to the function between the feed-forward projections.
        head_size: Attribute of the attention module that holds the size of a head.
        head_counters: Attributes of the attention module that hold the number of heads and must follow when heads are
            removed; entries that end in `*d` hold the number of heads times their size.
        ffn_size: Field of the model's config with the feed-forward width that all layers share.
        pre_norm: Whether a sublayer normalises its input (its output is then added to what came before the norm); a
            string names the field of the config that says so.
        norms: The normalisations after the sublayers; None for pre-norm models, and where they lie elsewhere.
        causal: Whether attention sees earlier tokens only; classifiers then read the last token.
        mean_pooled: Whether classifiers read the mean over all tokens instead of the first one.
        rotary: Whether queries and keys are rotated by their positions between projection and attention.
        counts_heads: Whether attention divides what its projections return by the number of heads, so that it takes
            nothing of another width.
        attention_interface: Whether attention is called through transformers' table of attention functions. The
            attention of other models cannot be replaced.
        attention_returns: How many values the attention module returns: its output, the attention weights, and what
            older releases of transformers add.
        head_bias: Argument of the attention module's forward with one number for each head and pair of tokens,
            [B, H, S, S] and the same for every example, computed outside the layer for the heads of the dense model.
        window_in_config: Whether the config's `sliding_window` applies to every layer; otherwise each attention module
            has its own window.
        free_heads: Whether stock transformers can build the model with fewer heads than fill the hidden size,
            because it reads `head_dim` from the config.
        position_work: Attention module -> its work on embeddings of relative positions.
    """

    layers: str
    attention: str
    projections: Mapping[str, tuple[Role, ...]]
    activation: str
    head_size: str
    ffn_size: str
    head_counters: tuple[str, ...] = ()
    pre_norm: bool | str = False
    norms: Norms | None = None
    causal: bool = False
    mean_pooled: bool = False
    rotary: bool = False
    counts_heads: bool = False
    attention_interface: bool = True
    attention_returns: int = 2
    head_bias: str | None = None
    window_in_config: bool = False
    free_heads: bool = False
    position_work: Callable[[nn.Module], PositionWork] | None = None

    @functools.cached_property
    def paths(self) -> dict[Role, str]:
        """Role -> path of the module that holds it."""
        return {role: path for path, roles in self.projections.items() for role in roles}

    @property
    def gated(self) -> bool:
        """Whether the feed-forward sublayer multiplies two projections."""
        return Role.GATE in self.paths

    def normalises_first(self, config: PretrainedConfig) -> bool:
        """Whether the sublayers of a model with this config are pre-norm."""
        return bool(getattr(config, self.pre_norm)) if isinstance(self.pre_norm, str) else self.pre_norm
