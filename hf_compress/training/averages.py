"""Named averages over many micro-batches, with one synchronisation when they are read."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class Averages:
    """Weighted means, and quotients of sums, by name.

    Example:
        >>> seen = Averages()
        >>> seen.add("task", torch.tensor(2.0))
        >>> seen.add("task", torch.tensor(5.0), weight=2)
        >>> seen.take()
        {'task': 4.0}
    """

    def __init__(self) -> None:
        self._pairs: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, value: Tensor, weight: int = 1) -> None:
        """Add a scalar that counts `weight` times."""
        # Sums of half precision overflow.
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        self.add_quotient(name, value * weight, torch.full_like(value, weight))

    def add_quotient(self, name: str, amount: Tensor, reference: Tensor) -> None:
        """Add two scalars, whose sums are divided in the end."""
        self._pairs[name].append(torch.stack([amount, reference]).detach())

    def take(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The averages since the last call, over all processes of `accelerator`."""
        sums: dict[str, tuple[float, float]] = {}
        for name, pairs in self._pairs.items():
            # Not every accelerator has double precision.
            amount, reference = torch.stack(pairs).cpu().double().sum(0).tolist()
            sums[name] = (amount, reference)
        self._pairs.clear()
        if accelerator is not None and accelerator.num_processes > 1:
            # By name: a process may have seen nothing of what others have, such as the rows of a short evaluation.
            everywhere: list[dict[str, tuple[float, float]]] = gather_object([sums])
            names = dict.fromkeys(name for each in everywhere for name in each)
            seen = {name: [each[name] for each in everywhere if name in each] for name in names}
            sums = {name: (sum(a for a, _ in pairs), sum(r for _, r in pairs)) for name, pairs in seen.items()}
        return {name: round(amount / max(reference, 1e-12), 6) for name, (amount, reference) in sums.items()}

    def clear(self) -> None:
        """Forget all of them."""
        self._pairs.clear()
