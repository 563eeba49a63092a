"""Checks the headers of weight files without reading the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from safetensors import safe_open
from torch import Tensor


def require_fit(files: Iterable[str | os.PathLike[str]], expected: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse weight files whose layers differ from a model in size, or hold integers for numbers or the reverse.

    transformers would print a table of sizes with the advice to ignore them, and would load integers as they are.
    Heads and embeddings may be replaced on purpose, so their sizes are left to it: only names with a layer's number
    count.

    Args:
        files: Weight files; only safetensors are checked.
        expected: Name -> parameter or buffer, as the model's `state_dict` names them.
        prefix: The base model's name; files may leave it out or add it.

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
                if not tensor.is_floating_point() and kind.startswith(("F", "BF")):
                    raise ValueError(f"The saved integers must be whole numbers, got {kind} in {name}.")
                if list(entry.get_shape()) != list(tensor.shape):
                    wrong.append(f"{name} has shape {entry.get_shape()} instead of {list(tensor.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 1} others)" if len(wrong) > 1 else ""
        raise ValueError(f"The saved weights do not fit config.json and its record: {wrong[0]}{more}.")
