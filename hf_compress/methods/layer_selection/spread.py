"""Whole numbers that are spread evenly."""

from __future__ import annotations


def even_layers(total: int, number: int) -> list[int]:
    """Indices spread evenly over a stack of layers: both ends, and between them multiples of one distance, rounded.

    Args:
        total: Layers of the stack.
        number: How many to take. A single one is the last; more than there are gives all.

    Source:
        For 6 of 12 these are the layers that DistilBERT was initialised with.

    Example:
        >>> even_layers(12, 6), even_layers(6, 3), even_layers(12, 1)
        ([0, 2, 4, 7, 9, 11], [0, 3, 5], [11])
    """
    if number >= total:
        return list(range(total))
    if number == 1:
        return [total - 1]
    gaps = number - 1
    # Halves are rounded up, in whole numbers: `round` would round them to even ones.
    return [(2 * place * (total - 1) + gaps) // (2 * gaps) for place in range(number)]
