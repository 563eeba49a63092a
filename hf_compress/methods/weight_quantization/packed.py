"""Linear layers whose weight is stored as packed integers and computed as ordinary numbers.

Letters: R outputs, C inputs, G groups, b bits.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.core.projections import PackedWeight, module_inputs, module_outputs
from hf_compress.methods.weight_quantization.grids import Grid
from hf_compress.methods.weight_quantization.packing import pack, packed_width, unpack
from hf_compress.methods.weight_quantization.rounding import Rounded, group_of_columns


@dataclass(frozen=True)
class Storage:
    """How the weight of a module is stored.

    Args:
        bits: b.
        group_size: Neighbouring inputs of a group; -1: all.
        symmetric: Whether the code of zero is `2**(bits - 1)` everywhere, and not stored.
        lists_groups: Whether the group of each input is stored, because they are not neighbours.
    """

    bits: int
    group_size: int
    symmetric: bool
    lists_groups: bool

    def num_groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else -(-columns // self.group_size)


class PackedModule(PackedWeight):
    """What `pack_` adds to a linear layer.

    The state holds `codes` [R, ceil(C b / 8)] uint8, `scales` [R, G] in the dtype of the model, `zeros`
    [R, ceil(G b / 8)] uint8 unless the grids are symmetric, and `groups` [C] int32 where they are listed. `weight` is
    computed from them when they were read, and again when the dtype changes: it is no parameter and is not saved.
    """

    storage: Storage
    codes: Tensor
    scales: nn.Parameter
    zeros: Tensor | None
    groups: Tensor | None
    weight: Tensor
    is_computed: bool

    def stored(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "groups")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def computed_weight(self) -> Tensor:
        """[R, C] the numbers that the integers stand for, in the dtype of the scales."""
        columns, (scale, zero) = self.columns, self._grid()
        groups = group_of_columns(columns, self.storage.group_size) if self.groups is None else self.groups.long()
        codes = unpack(self.codes, self.storage.bits, columns)
        if scale.shape[1] > 1:
            scale, zero = scale[:, groups.to(scale.device)], zero[:, groups.to(zero.device)]
        return (scale * (codes - zero)).to(self.scales.dtype)

    @property
    def columns(self) -> int:
        return module_inputs(self)  # type: ignore[arg-type]  # It is a linear layer, too.

    def rounded(self) -> Rounded:
        """The integers, one in each element, with their scales, zeros and groups."""
        codes = unpack(self.codes, self.storage.bits, self.columns)
        near = group_of_columns(self.columns, self.storage.group_size, codes.device)
        return Rounded(codes, Grid(*self._grid()), near if self.groups is None else self.groups.long())

    def _grid(self) -> tuple[Tensor, Tensor]:
        """[R, G] scales and zeros, in at least single precision."""
        scale = self.scales.detach()
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        if self.zeros is None:
            return scale, torch.full_like(scale, 2 ** (self.storage.bits - 1))
        return scale, unpack(self.zeros, self.storage.bits, scale.shape[1]).to(scale)

    @torch.no_grad()
    def compute_(self) -> None:
        """Compute the weight from what is stored, if that is there."""
        if not any(tensor.is_meta for tensor in self.stored().values()):
            matrix = self.computed_weight()
            self.weight = matrix.T.contiguous() if isinstance(self, Conv1D) else matrix
            self.is_computed = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_computed:
            # Read by a tool that tells nobody, such as one that keeps weights elsewhere until they are needed.
            self.compute_()
        if self.training and torch.is_grad_enabled() and self.scales.requires_grad:
            raise ValueError(NOT_TRAINABLE)
        return super().forward(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.scales.dtype
        # Otherwise empty memory would pass for a weight.
        self.is_computed = self.is_computed and not self.codes.is_meta
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        if self.scales.dtype != before and self.is_computed:
            # Scales were rounded: the weight is what they say now, as after a reload in this dtype.
            self.compute_()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.compute_()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.is_computed and not self.weight.is_meta:
            matrix = self.weight.T if isinstance(self, Conv1D) else self.weight
            if not torch.equal(matrix, self.computed_weight()):
                raise ValueError(
                    f"{prefix}weight must be what its packed integers say, but something has changed it (an adapter "
                    "that was merged?): it cannot be saved. Turn packed weights into ordinary ones first "
                    "(hc.dequantize(model)), then merge or change them."
                )
        super()._save_to_state_dict(destination, prefix, keep_vars)


NOT_TRAINABLE = (
    "A model with packed weights cannot be trained: its integers would not follow. Turn them into ordinary weights "
    "(hc.dequantize(model)), or train adapters on top of them (peft, with the model frozen)."
)


@functools.cache
def _packed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{kind.__name__}", (PackedModule, kind), {"__module__": __name__, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: int) -> tuple[object, ...]:
    # The class is made when it is needed, so pickle cannot find it by its name.
    return _unpickled, (type(module).__bases__[1],), module.__dict__


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    packed = _packed(kind)  # type: ignore[arg-type]  # mypy doubts that classes hash.
    return packed.__new__(packed)


def _become_packed_(module: nn.Linear | Conv1D, storage: Storage, stored: dict[str, Tensor | None]) -> None:
    weight = module.weight.detach()
    del module.weight
    for name in ("codes", "zeros", "groups"):
        module.register_buffer(name, stored[name])
    scales = stored["scales"]
    assert scales is not None
    # They ask for gradients wherever a training would, and so tell a trained model from one below adapters.
    module.scales = nn.Parameter(scales)
    module.register_buffer("weight", weight, persistent=False)
    module.storage, module.is_computed = storage, False  # type: ignore[assignment]  # no modules
    module.__class__ = _packed(type(module))  # type: ignore[assignment,arg-type]  # as above
    # Nothing in it is drawn at random where weights are missing.
    module._is_hf_initialized = True  # type: ignore[assignment]


def pack_(module: nn.Linear | Conv1D, rounded: Rounded, storage: Storage) -> None:
    """Replace the weight of a linear layer by integers; its class becomes a subclass of what it was.

    Args:
        module: Changed in place; bias and hooks stay.
        rounded: The new weight.
        storage: How to store it.
    """
    grid, bits = rounded.grid, storage.bits
    _become_packed_(
        module,
        storage,
        {
            "codes": pack(rounded.codes, bits),
            "scales": grid.scale.to(module.weight.dtype),
            "zeros": None if storage.symmetric else pack(grid.zero.to(torch.uint8), bits),
            "groups": rounded.groups.to(torch.int32) if storage.lists_groups else None,
        },
    )
    assert isinstance(module, PackedModule)
    module.compute_()


def pack_shapes_(module: nn.Linear | Conv1D, storage: Storage) -> None:
    """Give the linear layer of a skeleton the tensors of a packed one; their values are read later."""
    rows, columns = module_outputs(module), module_inputs(module)
    groups, weight = storage.num_groups(columns), module.weight

    def integers(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=weight.device)

    _become_packed_(
        module,
        storage,
        {
            "codes": integers(rows, packed_width(columns, storage.bits)),
            "scales": torch.ones(rows, groups, dtype=weight.dtype, device=weight.device),
            "zeros": None if storage.symmetric else integers(rows, packed_width(groups, storage.bits)),
            "groups": integers(columns, dtype=torch.int32) if storage.lists_groups else None,
        },
    )


def unpack_(module: nn.Module) -> None:
    """Make a packed layer what it was before, with the weight that its integers stand for."""
    assert isinstance(module, PackedModule)
    module.compute_()
    weight = module.weight
    for name in ("codes", "zeros", "groups", "weight"):
        module._buffers.pop(name)
    module._non_persistent_buffers_set.discard("weight")
    del module._parameters["scales"], module.storage, module.is_computed
    module.__class__ = type(module).__bases__[1]
    module.weight = nn.Parameter(weight)


def storage_of(config: Any) -> Storage:
    """How the weights of a model with a completed config are stored."""
    return Storage(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Storage)})
