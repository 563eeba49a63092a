"""Runs a model in eval mode without side effects, and tells whether it is being exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_exporting() -> bool:
    """Whether `torch.export` is recording the model, so that nothing may depend on values."""
    # torch 2.6 cannot tell; there, a model that cannot be exported fails with torch's own message.
    return getattr(torch.compiler, "is_exporting", bool)()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside a `with` statement, and give every module its mode back at the end.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     model[0].training
        False
        >>> [module.training for module in model]
        [True, False]
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
