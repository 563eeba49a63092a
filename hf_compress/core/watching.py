"""Watches a forward pass: functions are called before or after some modules run, and may end the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn


# Called with the positional and the keyword arguments of a module that is about to run.
Before: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], None]
# Called with the positional arguments and the output of a module that has run.
After: TypeAlias = Callable[[tuple[Any, ...], Any], None]


class Stop(Exception):
    """Raised by a watcher to end the forward pass, because the rest of it is not needed."""


@contextmanager
def watched(
    before: Iterable[tuple[nn.Module, Before]] = (), after: Iterable[tuple[nn.Module, After]] = ()
) -> Iterator[None]:
    """Call functions whenever some modules run. `Stop` from one of them ends the `with` statement without an error.

    Args:
        before: Modules, each with the function to call before it runs.
        after: Modules, each with the function to call after it ran.

    Example:
        >>> model, seen = nn.Sequential(nn.Identity(), nn.Identity()), []
        >>> with watched(before=[(model[1], lambda args, kwargs: seen.append(args[0]))]):
        ...     _ = model(7)
        >>> seen
        [7]
    """

    def entering(look: Before) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: look(args, kwargs)

    def leaving(look: After) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: look(args, output)

    handles = []
    try:
        for module, enter in before:
            handles.append(module.register_forward_pre_hook(entering(enter), with_kwargs=True))
        for module, leave in after:
            handles.append(module.register_forward_hook(leaving(leave)))
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
