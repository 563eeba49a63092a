"""Named averages over many micro-batches, with one synchronisation when they are read."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator
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
        found = {}
        for name, pairs in self._pairs.items():
            # Not every accelerator has double precision.
            sums = torch.stack(pairs).cpu().double().sum(0)
            if accelerator is not None and accelerator.num_processes > 1:
                sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
            amount, reference = sums.tolist()
            found[name] = round(amount / max(reference, 1e-12), 6)
        self._pairs.clear()
        return found

    def clear(self) -> None:
        """Forget all of them."""
        self._pairs.clear()
