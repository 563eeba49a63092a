"""All or nothing: restores a model when a change to it fails midway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig


class _Snapshot:
    """A snapshot of an object's attributes and of its own lists, dicts and sets. No tensor is copied."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.kind = type(thing)
        self.attributes = dict(vars(thing))
        # Emptied and filled again, never replaced: handles of hooks refer to these very dicts.
        self.contents = [
            (value, value.copy()) for value in self.attributes.values() if isinstance(value, dict | list | set)
        ]

    def restore(self) -> None:
        if type(self.thing) is not self.kind:
            self.thing.__class__ = self.kind
        vars(self.thing).clear()
        vars(self.thing).update(self.attributes)
        for container, content in self.contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore the modules, parameters, modes and config of a model if the block raises anything, even Ctrl-C.

    The very same objects are restored, so whatever the block replaces stays in memory until it ends.

    Args:
        model: The model that the block changes. The block may replace modules, change their class, replace parameters
            or their `data`, but it may not write into a tensor in place.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> first = model[0]
        >>> try:
        ...     with restored_on_failure(model):
        ...         model[0] = nn.Identity()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     model[0] is first
        True
    """
    modules = list(model.modules())
    configs = {id(value): value for m in modules for value in vars(m).values() if isinstance(value, PretrainedConfig)}
    for config in configs.copy().values():
        configs.update({id(part): part for part in vars(config).values() if isinstance(part, PretrainedConfig)})
    snapshots = [_Snapshot(thing) for thing in (*configs.values(), *modules)]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        for tensor, data, requires_grad in values:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            tensor.requires_grad_(requires_grad)
        raise
