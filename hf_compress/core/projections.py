"""One view of a weight matrix inside a transformer layer, however its module stores it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Role(Enum):
    """What a projection computes in its layer.

    `GATE` is the factor of a gated feed-forward sublayer that passes through the activation; `FFN_IN` is the other
    factor, and the only projection into the feed-forward width where there is no gate. `POSITION_QUERY` and
    `POSITION_KEY` project embeddings of relative positions, not tokens.
    """

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUT = "attention output"
    GATE = "gate"
    FFN_IN = "FFN in"
    FFN_OUT = "FFN out"
    POSITION_QUERY = "position query"
    POSITION_KEY = "position key"


# Roles whose outputs are cut into heads.
HEAD_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.POSITION_QUERY, Role.POSITION_KEY)
# Roles whose outputs are the feed-forward width.
NEURON_ROLES = (Role.GATE, Role.FFN_IN)
# Roles that some models of an architecture lack.
OPTIONAL_ROLES = (Role.POSITION_QUERY, Role.POSITION_KEY)


class CuttableLinear(nn.Linear):
    """Base class for a method's linear layer whose inputs and outputs can be cut like those of an `nn.Linear`.

    Derive from it to let a model be pruned after the method. Whatever the class adds must not depend on the shape.
    """


class PackedWeight(nn.Module):
    """Base class for a method's linear layer that stores its weight in a smaller form than it computes with.

    It derives from `nn.Linear` or `Conv1D`, too. Its `weight` is computed and no parameter, so it cannot be cut.
    """

    def stored(self) -> dict[str, Tensor]:
        """Name -> each tensor that is stored in place of the weight."""
        raise NotImplementedError


class InputlessConv1D(nn.Module):
    """Forward pass of a `Conv1D` without inputs; its own one cannot reshape what has no columns."""

    weight: Tensor
    bias: Tensor

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight.T, self.bias)


def is_cuttable(module: nn.Module) -> bool:
    """Whether inputs and outputs of a module can be removed without losing an adapter or other additions."""
    ordinary = type(module) in (nn.Linear, Conv1D) or isinstance(module, CuttableLinear | InputlessConv1D)
    return ordinary and not isinstance(module, PackedWeight) and not torch.nn.utils.parametrize.is_parametrized(module)


def matrix_of(module: nn.Linear | Conv1D) -> Tensor:
    """Get the weight of a module as [outputs, inputs]: the live parameter itself or a view of it."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


@dataclass(frozen=True, eq=False)
class Projection:
    """One weight matrix of a layer; several share a module where a model fuses them.

    Args:
        role: What it computes.
        path: Name of its module inside the layer.
        module: The live module. Hooks belong there; a fused module's output holds other projections, too.
        start: The first output of the module that belongs to this projection.
        stop: The output after the last one.

    Example:
        >>> fused = nn.Linear(4, 6)
        >>> Projection(Role.KEY, "Wqkv", fused, 2, 4).weight.shape
        torch.Size([2, 4])
    """

    role: Role
    path: str
    module: nn.Linear | Conv1D
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], a view: writing into it in place changes the parameter."""
        return matrix_of(self.module)[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """[outputs], also a view; None if the module has no bias."""
        return None if self.module.bias is None else self.module.bias[self.start : self.stop]

    @property
    def transposed(self) -> bool:
        """Whether the module stores [inputs, outputs]."""
        return isinstance(self.module, Conv1D)

    @property
    def fused(self) -> bool:
        """Whether the module holds other projections, too."""
        return self.out_features < module_outputs(self.module)

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def in_features(self) -> int:
        return module_inputs(self.module)


def module_outputs(module: nn.Linear | Conv1D) -> int:
    """The number of outputs of a linear layer. Adapters around a layer keep the attribute names of `nn.Linear`."""
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def module_inputs(module: nn.Linear | Conv1D) -> int:
    """The number of inputs of a linear layer."""
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)
