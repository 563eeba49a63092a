"""Lets models that are made of one model and the same examples share what a pass over the examples measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.data_needs import Data
from hf_compress.core.digests import weights_digest


Measured = TypeVar("Measured")

# Kind of measurement -> of what it was made last, and what it gave; None outside of `shared_passes`.
_LAST: ContextVar[dict[str, tuple[tuple[Any, ...], Any]] | None] = ContextVar("_LAST", default=None)


@contextmanager
def shared_passes() -> Iterator[None]:
    """Within the block, a pass that would measure what the one before it has measured is left out.

    One result of each kind is kept, in memory: as large as the statistics of all layers. A model comes out the same
    with and without the block, bit for bit.
    """
    token = _LAST.set({})
    try:
        yield
    finally:
        _LAST.reset(token)


def measured_once(
    kind: str, settings: tuple[Any, ...], model: PreTrainedModel, data: Data, measure: Callable[[], Measured]
) -> Measured:
    """What a pass measures, or has measured of the same weights, config and examples; it must not be changed.

    Args:
        kind: Which measurement it is.
        settings: All settings that it depends on.
        model: The model, not yet changed.
        data: Its examples.
        measure: Does the pass.
    """
    last = _LAST.get()
    if last is None or iter(data) is data:
        return measure()
    key = (*settings, type(model), model.config.to_json_string(), weights_digest(model), _digest(data))
    if kind not in last or last[kind][0] != key:
        # Two of a kind at a time would need twice the memory.
        last.pop(kind, None)
        last[kind] = key, measure()
    found: Measured = last[kind][1]
    return found


def _digest(data: Data) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in data:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} ".encode())
            _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        array = np.ascontiguousarray(value.detach().cpu().float() if value.is_floating_point() else value.cpu())
        digest.update(f"{array.shape} {value.dtype} ".encode() + array.tobytes())
    elif isinstance(value, Mapping):
        for name, each in sorted(value.items()):
            digest.update(f"{name} ".encode())
            _add(digest, each)
    else:
        digest.update(repr(value).encode())
