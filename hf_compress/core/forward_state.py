"""What the layers of a model tell each other, and the caller, during one forward pass.

A method whose layers share something hands it on as one object, under a keyword argument that travels from the base
model through transformers' `**kwargs` to every layer. Callers that want to look at it pass their own.
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
    """What is known of a forward pass when it is over. Tensors are on the model's device.

    Letters: B batch, S padded length, L layers.
    """

    def macs(self, layers: Sequence[TransformerLayer]) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates of the pass, and what a model without the method would have done.

        Returns:
            Two tensors [L], for each layer summed over the batch.
        """

    def kept_after(self, layer: int) -> Tensor | None:
        """[B, S] bool, True for the tokens that a layer has computed; None where nothing is known of it."""


class _StateHook:
    """A hook of the base model that gives every forward pass a state, unless the caller has brought one."""

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
        make: `(whole) -> new state`. `whole`: compute what no head reads, too.
    """
    if _hook_of(model) is None:
        model.base_model.register_forward_pre_hook(_StateHook(make), with_kwargs=True)


def carries_state(model: PreTrainedModel) -> bool:
    """Whether the layers of a model share a state, so that they may see fewer tokens than there are."""
    return _hook_of(model) is not None


def forward_state(model: PreTrainedModel, whole: bool = True) -> dict[str, ForwardState]:
    """A new state as keyword arguments for one call of a model or its base model; none for models that carry no state.

    Args:
        model: About to be called.
        whole: Compute also what its head does not read: for measurements, and where all hidden states are wanted.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> forward_state(BertModel(BertConfig(num_hidden_layers=1)))
        {}
    """
    hook = _hook_of(model)
    return {} if hook is None else {FORWARD_STATE: hook.make(whole)}


def state_in(arguments: Mapping[str, Any]) -> ForwardState | None:
    """The state among the keyword arguments of a call."""
    return arguments.get(FORWARD_STATE)
