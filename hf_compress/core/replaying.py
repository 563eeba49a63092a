"""Runs a model from one of its layers on: the layers before it return what they returned before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_compress.core.watching import After, watched


@contextmanager
def outputs_recorded(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect what some layers return while a model runs once inside the `with` statement.

    Example:
        >>> import torch
        >>> layers = [nn.Identity(), nn.Identity()]
        >>> with outputs_recorded(layers) as found:
        ...     _ = nn.Sequential(*layers)(torch.ones(1))
        >>> found
        [tensor([1.]), tensor([1.])]
    """
    found: list[Any] = []

    def look(args: tuple[Any, ...], output: Any) -> None:
        found.append(output)

    watchers: list[tuple[nn.Module, After]] = [(layer, look) for layer in layers]
    with watched(after=watchers):
        yield found


@contextmanager
def replayed(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let layers return recorded outputs instead of computing them.

    Args:
        layers: The first layers of a model.
        outputs: What each of them returned for the same inputs.
    """

    def returning(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    # Whatever stands in an instance already (hooks that move tensors between devices do so) comes back afterwards.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, output in zip(layers, outputs, strict=True):
            layer.forward = returning(output)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward
