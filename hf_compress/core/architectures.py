"""The supported architectures, and one view of a transformer layer that fits all of them.

Letters: H heads, G query heads a key-value head, d head size, D hidden, F feed-forward width, s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.attention import CORE
from hf_compress.core.layouts.audio import AUDIO
from hf_compress.core.layouts.decoders import DECODERS
from hf_compress.core.layouts.encoders import ENCODERS
from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.layouts.vision import VISION
from hf_compress.core.projections import (
    NEURON_ROLES,
    OPTIONAL_ROLES,
    PackedWeight,
    Projection,
    Role,
    is_cuttable,
    module_inputs,
    module_outputs,
)


ARCHITECTURES: dict[str, Architecture] = {**ENCODERS, **DECODERS, **VISION, **AUDIO}

# Fields of configs of models whose feed-forward sublayers are mixtures of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class TransformerLayer:
    """One transformer layer of a live model, seen through its architecture's row.

    A removable *attention unit* is one key-value head together with the query heads that share it, so that
    grouped-query attention keeps a whole number of queries per key; in ordinary attention a unit is one head.

    Args:
        index: Zero-based layer index.
        module: The live layer.
        architecture: Its row.
    """

    index: int
    module: nn.Module
    architecture: Architecture

    @property
    def modules(self) -> dict[str, nn.Linear | Conv1D]:
        """Path -> module of each projection; a fused module occurs once."""
        paths = self.architecture.projections
        return {path: self._linear(path) for path, roles in paths.items() if self._has(path, roles)}

    def _linear(self, path: str) -> nn.Linear | Conv1D:
        return cast(nn.Linear, self.module.get_submodule(path))

    def _has(self, path: str, roles: tuple[Role, ...]) -> bool:
        if roles[0] not in OPTIONAL_ROLES:
            return True
        parent, _, name = path.rpartition(".")
        return hasattr(self.module.get_submodule(parent), name)

    @property
    def projections(self) -> dict[Role, Projection]:
        """The projections by role, in the order of the row."""
        return {
            role: self._within(path, module, role)
            for path, module in self.modules.items()
            for role in self.architecture.projections[path]
        }

    def projection(self, role: Role) -> Projection:
        """Get the projection with a role; raises `KeyError` if the layer has none."""
        path = self.architecture.paths[role]
        return self._within(path, self._linear(path), role)

    def _within(self, path: str, module: nn.Linear | Conv1D, role: Role) -> Projection:
        roles = self.architecture.projections[path]
        start = sum(self._width(earlier) for earlier in roles[: roles.index(role)])
        return Projection(role, path, module, start, start + self._width(role))

    def _width(self, role: Role) -> int:
        """Outputs of the projection with a role."""
        if role in (Role.ATTENTION_OUT, Role.FFN_OUT):
            return self.hidden_size
        if role in NEURON_ROLES:
            return self.num_neurons
        context = self._inputs_of(Role.ATTENTION_OUT)
        return context // self.queries_per_unit if role in (Role.KEY, Role.VALUE) else context

    def _inputs_of(self, role: Role) -> int:
        return module_inputs(self._linear(self.architecture.paths[role]))

    @property
    def attention(self) -> nn.Module:
        """The module that splits heads."""
        return self.module.get_submodule(self.architecture.attention)

    @property
    def attention_out(self) -> Projection:
        """The projection from the concatenated heads to the hidden size."""
        return self.projection(Role.ATTENTION_OUT)

    @property
    def ffn_out(self) -> Projection:
        """The projection from the feed-forward width to the hidden size."""
        return self.projection(Role.FFN_OUT)

    @property
    def activation(self) -> nn.Module:
        """The activation behind `GATE`, or behind `FFN_IN` where there is no gate."""
        return self.module.get_submodule(self.architecture.activation)

    @property
    def hidden_size(self) -> int:
        return module_outputs(self._linear(self.architecture.paths[Role.ATTENTION_OUT]))

    @property
    def head_size(self) -> int:
        return int(getattr(self.attention, self.architecture.head_size))

    @property
    def queries_per_unit(self) -> int:
        return int(getattr(self.attention, "num_key_value_groups", 1))

    @property
    def unit_size(self) -> int:
        """Columns of the context that one attention unit owns."""
        return self.head_size * self.queries_per_unit

    @property
    def num_units(self) -> int:
        return self._inputs_of(Role.ATTENTION_OUT) // self.unit_size

    @property
    def num_neurons(self) -> int:
        return self._inputs_of(Role.FFN_OUT)

    @property
    def window(self) -> int | None:
        """The smallest distance that a token does not see; None if every token sees every other one."""
        holder: Any = self.attention
        found = getattr(holder.config if self.architecture.window_in_config else holder, "sliding_window", None)
        return None if found is None else int(found)

    def macs_per_unit(self, seq_len: float) -> float:
        """Multiply-accumulates of one attention unit for a sequence of `seq_len` tokens.

        Source:
            Kwon et al. 2022 (arXiv 2204.09656): `3 s D d + 2 s^2 d + s d D` a head; keys and values are counted
            once a group under grouped-query attention.
        """
        in_projections = (self.queries_per_unit + 2) * seq_len * self.hidden_size * self.head_size
        # Without units they cost nothing.
        shared = (self.attention_macs(seq_len) + self.position_macs) / max(self.num_units, 1)
        return in_projections + shared + seq_len * self.unit_size * self.hidden_size

    def attention_macs(self, seq_len: float) -> float:
        """Multiply-accumulates between the projections, unless attention was replaced.

        Two for each pair of tokens that see each other and each column of the context: `2 s^2` a column, or in a
        window that reaches `r` tokens to both sides `2 (s (2 r + 1) - r (r + 1))`, with `r` at most `s - 1`. Masked
        pairs are not counted there, although kernels without windows compute them; causal attention counts all pairs.
        Products with embeddings of relative positions are counted, one for each token, embedding and column.
        """
        width, core = self._inputs_of(Role.ATTENTION_OUT), getattr(self.attention, CORE, None)
        if core is not None and width:
            return float(core.macs(seq_len, width, self.hidden_size))
        reach = seq_len - 1 if self.window is None else min(self.window - 1, seq_len - 1)
        positions = 0.0
        if self.architecture.position_work is not None:
            rows, _, products = self.architecture.position_work(self.attention)
            positions = products * seq_len * rows * width
        return 2 * (seq_len * (2 * reach + 1) - reach * (reach + 1)) * width + positions

    @property
    def position_macs(self) -> float:
        """Multiply-accumulates that project embeddings of relative positions: once for a whole batch."""
        if self.architecture.position_work is None:
            return 0.0
        rows, projections, _ = self.architecture.position_work(self.attention)
        return float(projections * rows * self.hidden_size * self._inputs_of(Role.ATTENTION_OUT))

    def macs_per_neuron(self, seq_len: float) -> float:
        """Multiply-accumulates of one feed-forward neuron: `2 s D`, or `3 s D` with a gate."""
        return (3 if self.architecture.gated else 2) * seq_len * self.hidden_size


def base_of(model: Any) -> Any:
    """The transformers model below adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Find the architecture of a model.

    Raises:
        ValueError: If it is not supported; names the supported types.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES and any(getattr(config, name, None) for name in _EXPERTS):
        raise ValueError(
            f"model must have one feed-forward sublayer in each layer, got {kind!r} ({type(model).__name__}), whose "
            f"layers mix experts. Supported are {', '.join(ARCHITECTURES)}."
        )
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r} ({type(model).__name__})."
        )
    return ARCHITECTURES[kind]


def layers_of(model: PreTrainedModel, adapted: bool = False, packed: bool = False) -> list[TransformerLayer]:
    """List the transformer layers of a model, from the first to the last.

    Args:
        model: A supported architecture.
        adapted: Allow adapters around the projections, because only shapes are read.
        packed: Allow weights that are stored as packed integers, for the same reason.

    Raises:
        ValueError: If the architecture is not supported, or if a projection is not an ordinary linear layer (an
            adapter or a quantised layer cannot be sliced without losing what it adds).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> [layer.num_neurons for layer in layers_of(BertModel(tiny))]
        [16, 16]
    """
    row = architecture_of(model)
    modules = cast(nn.ModuleList, model.base_model.get_submodule(row.layers))
    layers = [TransformerLayer(index, module, row) for index, module in enumerate(modules)]
    for layer in () if adapted else layers:
        for path, module in layer.modules.items():
            if isinstance(module, PackedWeight):
                if packed:
                    continue
                raise ValueError(
                    f"Layer {layer.index} {path} must have an ordinary weight, got packed integers, which cannot be "
                    "changed. Turn them into ordinary weights first (hc.dequantize(model))."
                )
            if not is_cuttable(module):
                raise ValueError(
                    f"Layer {layer.index} {path} must be a plain torch.nn.Linear, got {type(module).__name__}. "
                    "Merge adapters (merge_and_unload) or load the model unquantised first."
                )
    return layers
