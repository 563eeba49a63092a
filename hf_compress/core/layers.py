"""Changes the forward pass of a live module."""

from __future__ import annotations

import functools

from torch import nn


def specialise_(layer: nn.Module, behaviour: type[nn.Module]) -> None:
    """Give a live module, such as a layer, the forward of another class, without wrapping it.

    The new class derives from both and keeps the layer's class name: names of parameters, `isinstance`, hidden-state
    capture, gradient checkpointing and wrap policies that look classes up by name all go on working.
    """
    layer.__class__ = _specialised(behaviour, type(layer))  # type: ignore[arg-type]  # mypy doubts that classes hash.


@functools.cache
def _specialised(behaviour: type[nn.Module], old: type[nn.Module]) -> type[nn.Module]:
    fields = {"__module__": old.__module__, "__reduce_ex__": _reduce}
    return type(old.__name__, (behaviour, old), fields)


def _reduce(layer: nn.Module, protocol: int) -> tuple[object, ...]:
    # Pickle looks classes up by name, and under this name it would find the layer's own class.
    behaviour, old = type(layer).__bases__
    return _unpickled, (behaviour, old), layer.__dict__


def _unpickled(behaviour: type[nn.Module], old: type[nn.Module]) -> nn.Module:
    kind = _specialised(behaviour, old)  # type: ignore[arg-type]  # mypy doubts that classes hash.
    return kind.__new__(kind)
