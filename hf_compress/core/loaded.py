"""Makes sure that nothing trains or measures on weights that were not in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def require_complete(
    loading_info: Mapping[str, Any], allowed: Callable[[str], bool] | None = None, remedy: str = ""
) -> None:
    """Refuse a model that `from_pretrained` had to complete with random weights.

    Args:
        loading_info: The second result of `from_pretrained(..., output_loading_info=True)`.
        allowed: Whether the tensor of a given name may start at random, such as a new head's. None: no tensor may.
        remedy: What to do, a sentence; the message ends with it.

    Raises:
        ValueError: Names the tensors that the files lack, and those that nothing reads.

    Example:
        >>> require_complete({"missing_keys": {"classifier.bias"}}, lambda name: name.startswith("classifier."))
        >>> require_complete({"missing_keys": {"classifier.bias"}, "unexpected_keys": {"module.classifier.bias"}})
        Traceback (most recent call last):
        ValueError: its weight files lack classifier.bias, which would be random; ... reads: module.classifier.bias.
    """
    missing = sorted(name for name in loading_info["missing_keys"] if allowed is None or not allowed(name))
    if not missing:
        return
    unread = sorted(loading_info.get("unexpected_keys", ()))
    hint = f"; they hold tensors that no layer of the model reads: {_some(unread)}" if unread else ""
    raise ValueError(f"its weight files lack {_some(missing)}, which would be random{hint}.{remedy and f' {remedy}'}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
