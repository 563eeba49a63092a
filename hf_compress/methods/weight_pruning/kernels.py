"""Sparse formats that torch has kernels for, and linear modules that also hold their weight in one of them.

The dense weight stays beside the packed one, so that saving, the record and training know nothing of this; the price
is memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Share of zeros from which CSR pays: at 0.8 it breaks even with dense products, at 0.9 it wins (see the README).
_CSR_SPARSITY = 0.85
# Tokens up to which it pays for every shape tried; dense products gain more from large inputs.
_CSR_ROWS = 128
# Both of torch's backends take 2:4 weights whose sizes are multiples of these.
_ROWS, _COLUMNS = 32, 64


def csr_obstacle(weight: Tensor) -> str | None:
    """Why a weight cannot use the CSR kernel, or None."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]  # of torch
        return "this build of torch has no MKL, which holds the fast CSR kernel"
    if weight.dtype != torch.float32:
        return f"dtype must be float32 on the CPU, got {str(weight.dtype).removeprefix('torch.')}"
    zeros = 1 - int(weight.count_nonzero()) / weight.numel()
    if zeros < _CSR_SPARSITY:
        return f"at least {_CSR_SPARSITY} of the weight must be zero on the CPU, got {zeros:.2f}"
    return None


def two_of_four_obstacle(weight: Tensor, capability: tuple[int, int]) -> str | None:
    """Why a weight cannot use sparse tensor cores, or None.

    Args:
        weight: Of a linear module.
        capability: Compute capability of its device.
    """
    if capability < (8, 0):
        return f"the GPU must have compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16 on CUDA, got {str(weight.dtype).removeprefix('torch.')}"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"shape must be a multiple of {_ROWS} x {_COLUMNS}, got {weight.shape[0]} x {weight.shape[1]}"
    groups = (weight.view(len(weight), -1, 4) != 0).sum(2)
    dense = int((groups > 2).sum())
    if dense:
        return f"the weight must be 2:4, got {dense} of {groups.numel()} groups of four with more than two non-zeros"
    return None


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # "CSR support is in beta state": what is used of it is tested here.
        warnings.simplefilter("ignore")
        return weight.detach().to_sparse_csr()


def _csr_linear(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    # Sparse times dense is the fast order of the two by far; the result is a view with tokens as columns.
    columns = inputs.reshape(-1, inputs.shape[-1]).t()
    result = matrix @ columns if bias is None else torch.addmm(bias[:, None], matrix, columns)
    return result.t().reshape(*inputs.shape[:-1], len(matrix))


def _two_of_four(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # "The API is in prototype stage": failures are reported, not raised.
        warnings.simplefilter("ignore")
        return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())


def _two_of_four_linear(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(inputs.contiguous(), matrix, bias)


@dataclass(frozen=True)
class Format:
    """A sparse format and its kernel.

    Args:
        name: For reports.
        obstacle: Weight -> why it does not fit, or None.
        pack: Weight -> packed weight.
        linear: (inputs, packed weight, bias) -> outputs.
        max_rows: Tokens up to which it is used without measuring more; None: any number.
    """

    name: str
    obstacle: Callable[[Tensor], str | None]
    pack: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    max_rows: int | None


def format_for(device: torch.device) -> Format:
    """The format of a device.

    Raises:
        ValueError: If torch has none for it.
    """
    if device.type == "cpu":
        return Format("csr", csr_obstacle, _csr, _csr_linear, _CSR_ROWS)
    # Other makers' GPUs call themselves CUDA, too.
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        return Format("2:4", lambda w: two_of_four_obstacle(w, capability), _two_of_four, _two_of_four_linear, None)
    raise ValueError(f"model must be on the CPU or on an NVIDIA GPU to be accelerated, got {device.type}.")


class Original:
    """Notices when the dense weight behind a packed one has changed.

    torch counts ordinary in-place changes. It does not count those through `.data` or NumPy; reading the whole weight
    at every call would cost what packing gains, so on the CPU the largest value of every row and of every column is
    compared. A change of a few other values through `.data` or NumPy goes unnoticed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.version, self.address, self.dtype = weight, weight._version, weight.data_ptr(), weight.dtype
        self.probes: tuple[Tensor, Tensor] | None = None
        # Reading them would wait for a GPU.
        if weight.device.type == "cpu":
            sizes, (rows, columns) = weight.detach().abs(), weight.shape
            self.probes = (
                torch.cat([torch.arange(rows), sizes.argmax(0)]),
                torch.cat([sizes.argmax(1), torch.arange(columns)]),
            )
            self.values = weight.detach()[self.probes]

    def is_still(self, weight: Tensor) -> bool:
        """Whether a layer's weight is this one, with the values it had."""
        return (
            weight is self.weight
            and weight._version == self.version
            and weight.dtype == self.dtype
            and weight.data_ptr() == self.address
            and (self.probes is None or torch.equal(weight.detach()[self.probes], self.values))
        )


@dataclass
class Pack:
    """A packed weight, and the dense one behind it."""

    form: Format
    matrix: Tensor
    original: Original
    max_rows: float

    def fits(self, linear: nn.Linear, inputs: Tensor) -> bool:
        weight = linear.weight
        return (
            inputs.device == self.matrix.device == weight.device
            and inputs.dtype == weight.dtype
            and inputs.numel() <= self.max_rows * linear.in_features
            and not torch.is_autocast_enabled(inputs.device.type)
            and self.original.is_still(weight)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        # A copy has weights of its own and runs dense until it is accelerated itself.
        return None


class PackedLinear(nn.Linear):
    """A linear module with a second, sparse form of its weight, used in evaluation without gradients where it fits."""

    pack: Pack | None

    def forward(self, inputs: Tensor) -> Tensor:
        pack = self.pack
        if pack is None or self.training or torch.is_grad_enabled() or not pack.fits(self, inputs):
            return super().forward(inputs)
        return pack.form.linear(inputs, pack.matrix, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Casting there and back leaves the same parameter with other values.
        self.pack = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        return self


def set_pack_(linear: nn.Linear, pack: Pack | None) -> None:
    """Give a linear module a packed weight; None: it runs dense for now."""
    linear.__class__ = PackedLinear
    object.__setattr__(linear, "pack", pack)


def unpack_(linear: nn.Linear) -> None:
    """Make a module an ordinary linear one again."""
    if type(linear) is PackedLinear:
        del linear.__dict__["pack"]
        # The subclass adds nothing but the pack.
        linear.__class__ = nn.Linear  # type: ignore[assignment]  # back to the plain class
