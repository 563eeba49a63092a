"""Visits modules in the order in which a model runs them, each with the inputs that earlier modules now compute."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from hf_compress.core.calibration import Statistic, collect_inputs
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import NotWalkable


logger = logging.getLogger(__name__)

Data: TypeAlias = Iterable[Mapping[str, Any]]
# Feeds the inputs of the current modules to a statistic.
Observe: TypeAlias = Callable[[Statistic], None]


@dataclass(frozen=True)
class _SharedInput:
    """Modules that have the very same input tensor.

    Args:
        names: Names of the modules, in the order in which they run.
        repeated: Whether the model runs the module more than once; a repeated module is alone in its group.
        layer: Name of the list of layers that holds the modules, and their index in it; None: no list holds them.
    """

    names: list[str]
    repeated: bool
    layer: tuple[str, int] | None


def sweep(model: PreTrainedModel, calls: Sequence[tuple[str, int]], data: Data) -> Iterator[tuple[list[str], Observe]]:
    """Visits groups of modules with the same input, in the order in which they run, and shows that input.

    Changes to modules show in the inputs of later modules. Lists of layers are walked once; for modules outside of
    them, and for layers that do not simply follow each other, the data runs through the model from its embeddings on.

    Args:
        model: Any transformers model. Modules may be changed in place between two items.
        calls: The result of `call_order` for the modules.
        data: Batches of inputs that can be read again and again.

    Raises:
        ValueError: If a module reads something other than tokens, or gets a non-finite input.
    """
    sets = _shared_inputs(model, calls)
    for stack, group in itertools.groupby(sets, key=lambda entry: entry.layer and entry.layer[0]):
        part = list(group)
        walk = _walk(model, stack, part, sets, data) if stack is not None else None
        yield from _from_embeddings(model, part, data) if walk is None else _along(model, walk, part)


def _shared_inputs(model: nn.Module, calls: Sequence[tuple[str, int]]) -> list[_SharedInput]:
    counts = Counter(name for name, _ in calls)
    sets: list[list[str]] = []
    seen: dict[str, int] = {}
    for name, number in calls:
        if name in seen:
            continue
        last = sets[-1][-1] if sets else None
        if last is not None and counts[name] == counts[last] == 1 and seen[last] == number:
            sets[-1].append(name)
        else:
            sets.append([name])
        seen[name] = number
    return [_SharedInput(names, counts[names[0]] > 1, _layer_of(model, names)) for names in sets]


def _layer_of(model: nn.Module, names: Sequence[str]) -> tuple[str, int] | None:
    found = {_outermost_list(model, name) for name in names}
    return found.pop() if len(found) == 1 else None


def _outermost_list(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The first list of modules on the path to a module, and the index of the entry on that path."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path, int(parts[depth])
    return None


def _walk(
    model: PreTrainedModel, stack: str, part: Sequence[_SharedInput], sets: Sequence[_SharedInput], data: Data
) -> LayerWalk | None:
    """Make a walk along a list of layers; None if running them one by one would differ from the model."""
    indices = [entry.layer[1] for entry in part if entry.layer is not None]
    # Modules that run between these layers could not be visited in order.
    elsewhere = sum(entry.layer is not None and entry.layer[0] == stack for entry in sets) > len(part)
    reason = "other modules run between them" if elsewhere or indices != sorted(indices) else None
    if any(entry.repeated for entry in part):
        reason = "they share modules"
    try:
        if reason is None:
            layers = model.get_submodule(stack)
            assert isinstance(layers, nn.ModuleList)
            return LayerWalk(model, list(layers), data)
    except NotWalkable as error:
        reason = str(error)
    logger.info("The data runs through the whole model for every part of %s: %s.", stack, reason)
    return None


def _along(
    model: PreTrainedModel, walk: LayerWalk, part: Sequence[_SharedInput]
) -> Iterator[tuple[list[str], Observe]]:
    by_layer: dict[int, list[_SharedInput]] = {}
    for entry in part:
        assert entry.layer is not None
        by_layer.setdefault(entry.layer[1], []).append(entry)
    for index in itertools.takewhile(lambda index: index <= max(by_layer), walk):
        for entry in by_layer.get(index, []):
            name = entry.names[0]
            yield entry.names, functools.partial(_see, walk, name, model.get_submodule(name))


def _see(walk: LayerWalk, name: str, module: nn.Module, statistic: Statistic) -> None:
    walk.observe({name: module}, {name: statistic})


def _from_embeddings(
    model: PreTrainedModel, part: Sequence[_SharedInput], data: Data
) -> Iterator[tuple[list[str], Observe]]:
    for entry in part:

        def observe(statistic: Statistic, name: str = entry.names[0], repeated: bool = entry.repeated) -> None:
            modules = {name: model.get_submodule(name)}
            collect_inputs(model, modules, {name: statistic}, data, description=name, whole=repeated)

        yield entry.names, observe
