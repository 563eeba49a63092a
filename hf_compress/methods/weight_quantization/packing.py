"""Packs small whole numbers into bytes without gaps.

Letters: R rows, C numbers of a row, b bits of a number.
"""

from __future__ import annotations

import torch
from torch import Tensor


# So many numbers of b bits fill b whole bytes.
_NUMBERS = 8
# Words of numbers that are unpacked at a time: intermediate results are eight times as large.
_WORDS = 2**22


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of so many numbers.

    Example:
        >>> packed_width(3, 4), packed_width(8, 3)
        (2, 3)
    """
    return (columns * bits + 7) // 8


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack each row into bytes: bit i of a row is bit `i % 8`, the lowest first, of its byte `i // 8`.

    Args:
        numbers: [R, C] uint8, each below `2**bits`.
        bits: b, 1 to 8. The lowest bit of number j is bit `j * bits` of its row.

    Returns:
        [R, ceil(C b / 8)] uint8; bits behind the last number are 0.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4)   # 0x21, 0x03
        tensor([[33,  3]], dtype=torch.uint8)
    """
    if bits == 8:
        return numbers.contiguous()
    rows, columns = numbers.shape
    words = -(-columns // _NUMBERS)
    padded = torch.nn.functional.pad(numbers, (0, words * _NUMBERS - columns)).view(rows, words, _NUMBERS)
    word = torch.zeros(rows, words, dtype=torch.int64, device=numbers.device)
    for place in range(_NUMBERS):
        word |= padded[:, :, place].long() << (bits * place)
    packed = torch.stack([(word >> (8 * place)) & 255 for place in range(bits)], 2).to(torch.uint8)
    return packed.view(rows, words * bits)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: [R, ceil(C b / 8)] uint8.
        bits: b.
        columns: C.

    Returns:
        [R, C] uint8.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, columns=3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    if bits == 8:
        return packed
    rows, words = packed.shape[0], -(-columns // _NUMBERS)
    numbers = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    step = max(_WORDS // max(words, 1), 1)
    for start in range(0, rows, step):
        part = packed[start : start + step]
        part = torch.nn.functional.pad(part, (0, words * bits - part.shape[1])).view(len(part), words, bits)
        word = torch.zeros(len(part), words, dtype=torch.int64, device=packed.device)
        for place in range(bits):
            word |= part[:, :, place].long() << (8 * place)
        found = torch.stack([(word >> (bits * place)) & (2**bits - 1) for place in range(_NUMBERS)], 2)
        numbers[start : start + step] = found.view(len(part), words * _NUMBERS)[:, :columns].to(torch.uint8)
    return numbers
