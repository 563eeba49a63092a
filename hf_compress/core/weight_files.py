"""What a file of weights says of itself, without reading the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from safetensors import safe_open
from torch import Tensor


def require_fit(files: Iterable[str | os.PathLike[str]], expected: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse weight files whose layers have other sizes than a model, or hold integers.

    transformers would report sizes as a table that ends in the advice to ignore them, and take integers as they are.
    Heads and embeddings may be replaced on purpose, so their sizes are left to it: only names with a layer's number
    count.

    Args:
        files: Those that are not safetensors are not looked at.
        expected: Name -> parameter or buffer, as the model's `state_dict` names them.
        prefix: Of the base model; files may leave it out or add it.

    Raises:
        ValueError: Names the first tensor that does not fit.
    """
    start, wrong = f"{prefix}.", []
    known = {name.removeprefix(start): tensor for name, tensor in expected.items()}
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118  (not a dict)
                entry, tensor = saved.get_slice(name), known.get(name.removeprefix(start))
                if tensor is None or not re.search(r"\.\d+\.", name):
                    continue
                kind = entry.get_dtype()
                if tensor.is_floating_point() and not kind.startswith(("F", "BF")):
                    raise ValueError(f"The saved weights must be floating-point numbers, got {kind} in {name}.")
                if list(entry.get_shape()) != list(tensor.shape):
                    wrong.append(f"{name} has shape {entry.get_shape()} instead of {list(tensor.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 1} others)" if len(wrong) > 1 else ""
        raise ValueError(f"The saved weights do not fit config.json and its record: {wrong[0]}{more}.")
