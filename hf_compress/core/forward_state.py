"""A state that the layers of a model share with each other, and with the caller, during one forward pass.

A method whose layers share something passes it as one object, in a keyword argument that transformers' `**kwargs`
carry from the base model to every layer. A caller that wants to read it passes an object of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer


# The keyword argument.
FORWARD_STATE = "forward_state"


class ForwardState(Protocol):
    """The results of a forward pass beside its outputs. Tensors are on the model's device.

    Letters: B batch, S padded length, L layers.
    """

    def macs(self, layers: Sequence[TransformerLayer]) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates of the pass, and those of the same pass without the method.

        Returns:
            Two tensors [L], one sum over the batch for each layer.
        """

    def kept_after(self, layer: int) -> Tensor | None:
        """[B, S] bool, True for the tokens that a layer keeps; None if the state holds nothing about that layer."""


class _StateHook:
    """A hook of the base model that gives every forward pass a state, unless the caller has passed one."""

    def __init__(self, make: Callable[[bool], ForwardState]) -> None:
        self.make = make

    def __call__(
        self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if FORWARD_STATE not in kwargs:
            kwargs[FORWARD_STATE] = self.make(False)
        return args, kwargs


def _hook_of(model: PreTrainedModel) -> _StateHook | None:
    hooks = model.base_model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _StateHook)), None)


def carry_state_(model: PreTrainedModel, make: Callable[[bool], ForwardState]) -> None:
    """Let every forward pass of a model carry a state.

    Args:
        model: Its layers read the keyword argument `FORWARD_STATE`.
        make: `(whole) -> new state`. `whole`: also compute rows that no head reads.
    """
    if _hook_of(model) is None:
        model.base_model.register_forward_pre_hook(_StateHook(make), with_kwargs=True)


def carries_state(model: PreTrainedModel) -> bool:
    """Whether the layers of a model share a state, so that they may see fewer tokens than there are."""
    return _hook_of(model) is not None


def forward_state(model: PreTrainedModel, whole: bool = True) -> dict[str, ForwardState]:
    """Make the keyword arguments that give one call of a model a new state; none if its layers share no state.

    Args:
        model: The model to call, or its base model.
        whole: Also compute rows that its head does not read: for measurements, and if all hidden states are needed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> forward_state(BertModel(BertConfig(num_hidden_layers=1)))
        {}
    """
    hook = _hook_of(model)
    return {} if hook is None else {FORWARD_STATE: hook.make(whole)}


def state_in(arguments: Mapping[str, Any]) -> ForwardState | None:
    """Find the state among the keyword arguments of a call; None if there is none."""
    return arguments.get(FORWARD_STATE)
