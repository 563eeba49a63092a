"""Records the arguments of each layer of a model in one real forward pass, so that it can run alone later.

Letters: B batch, S padded length, D hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_compress.core.watching import After, Before, Stop, watched


class NotWalkable(ValueError):
    """The layers of a model do not run one after the other, each on the output of the one before it."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one batch, without the hidden states.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        position: Index of the hidden states among the positional arguments. None: they are the keyword
            `hidden_states`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LayerCall, Tensor]:
        """Split the arguments of a layer into a call and the hidden states.

        Raises:
            NotWalkable: If neither the first argument nor `hidden_states` is a tensor.
        """
        position = None if "hidden_states" in kwargs else 0
        states = kwargs.get("hidden_states", args[0] if args else None)
        if not torch.is_tensor(states):
            raise NotWalkable(
                f"the first argument of a layer is {type(states).__name__}, not a tensor of hidden states"
            )
        # The cache of earlier keys and values: it is empty here, and a layer would add to it at every call.
        others = tuple(None if isinstance(arg, Cache) else arg for arg in (args if position is None else args[1:]))
        named = {
            name: None if isinstance(value, Cache) else value
            for name, value in kwargs.items()
            if name != "hidden_states"
        }
        return LayerCall(others, named, position), states

    def run(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Run a layer on hidden states: [B, S, D]."""
        if self.position is None:
            return first_of(layer(*self.args, hidden_states=states, **self.kwargs))
        return first_of(layer(states, *self.args, **self.kwargs))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LayerCall:
        """Make the same call with its tensors replaced."""
        args, kwargs = (_mapped(part, change) for part in (self.args, self.kwargs))
        return LayerCall(args, kwargs, self.position)


def first_of(output: Any) -> Tensor:
    """Take the hidden states from the return value of a layer."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if torch.is_tensor(value):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    if type(value) is dict:
        return {name: _mapped(part, change) for name, part in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class LayerRecorder:
    """Records the calls of layers during one forward pass, and refuses passes that cannot be repeated layer by layer.

    Args:
        layers: Modules that are expected to run once each, in this order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._calls: list[LayerCall] = []
        self._states: Tensor | None = None
        self._output: Tensor | None = None
        # The outputs of layers so far, as long as something else refers to them.
        self._returned: list[weakref.ref[Tensor]] = []

    def recording(self) -> AbstractContextManager[None]:
        """Record the forward pass that runs inside the `with` statement."""
        return watched(
            before=[(layer, self._entering(index)) for index, layer in enumerate(self._layers)],
            after=[(layer, self._left) for layer in self._layers],
        )

    def _entering(self, index: int) -> Before:
        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index != len(self._calls):
                raise NotWalkable(f"layer {index} runs where layer {len(self._calls)} was expected")
            call, states = LayerCall.of(args, kwargs)
            if self._output is None:
                self._states = states
            elif states is not self._output and not _equal(states, self._output):
                raise NotWalkable(f"layer {index} does not read the output of layer {index - 1}")
            if any(kept() is tensor for tensor in _tensors([call.args, call.kwargs]) for kept in self._returned):
                raise NotWalkable(f"layer {index} reads more of earlier layers than the output of layer {index - 1}")
            self._calls.append(call)

        return enter

    @property
    def _left(self) -> After:
        def leave(args: tuple[Any, ...], output: Any) -> None:
            self._output = first_of(output)
            self._returned += [weakref.ref(tensor) for tensor in _tensors(output)]

        return leave

    @property
    def begun(self) -> bool:
        """Whether a layer has run."""
        return bool(self._calls)

    def finished(self) -> tuple[list[LayerCall], Tensor]:
        """The calls, and the input of the first layer.

        Raises:
            NotWalkable: If a layer did not run.
        """
        if self._states is None or len(self._calls) < len(self._layers):
            raise NotWalkable(f"layer {len(self._calls)} does not run")
        return self._calls, self._states


# What layers of transformers' models make of their hidden states; the second entry of a tuple are attention weights.
_RETURNED: tuple[Callable[[Tensor], Any], ...] = (
    lambda states: states,
    lambda states: (states,),
    lambda states: (states, None),
)


def recorded_idle(layers: Sequence[nn.Module], run: Callable[[], None]) -> tuple[list[LayerCall], Tensor]:
    """Record the calls of layers that compute nothing, so that their weights need not be there.

    Each layer passes its input on. What layers return (a tensor, or a tuple that begins with it) is tried out.

    Args:
        layers: Modules that are expected to run once each, in this order.
        run: Runs the model once.

    Returns:
        The calls, and the input of the first layer.

    Raises:
        NotWalkable: If the layers do not run one after the other in any of these ways.
    """
    reason: Exception | None = None
    for returned in _RETURNED:
        recorder = LayerRecorder(layers)
        try:
            with recorder.recording(), _idle(layers, returned):
                run()
            return recorder.finished()
        except (NotWalkable, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if not recorder.begun:
                # What fails before the first layer has nothing to do with what layers return.
                raise
            reason = reason or error
    raise NotWalkable(str(reason)) from reason


@contextmanager
def _idle(layers: Sequence[nn.Module], returned: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let each layer return its input unchanged, and end the forward pass at the last one."""

    def passing(*args: Any, **kwargs: Any) -> Any:
        # Another object, because the recorder asks which of them later layers read.
        return returned(LayerCall.of(args, kwargs)[1].detach())

    def ending(*args: Any, **kwargs: Any) -> Any:
        raise Stop

    try:
        for layer in layers:
            layer.forward = ending if layer is layers[-1] else passing
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, possibly on two devices, hold the same values."""
    return one.shape == other.shape and torch.equal(one, other.to(one.device))
