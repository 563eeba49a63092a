"""The config of a model with weights of few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_compress.core.expressions import check_expressions
from hf_compress.core.method import MethodConfig


@dataclass(kw_only=True)
class WeightQuantizationConfig(MethodConfig):
    """The projections of the layers as integers of 2 to 8 bits. Embeddings, norms, biases and heads stay as they are.

    Args:
        bits: Bits of a weight, 2 to 8.
        group_size: Neighbouring inputs that share a scale; -1: all inputs of an output. The last group of a row may be
            smaller.
        symmetric: Let each grid reach as far below zero as above, with no zero points to store.
        act_order: Round the weights of large inputs first. Left out: in models with gated feed-forward layers (Llama
            and its relatives), where it helps.
        static_groups: Fit the grids of groups to the weights as they are before any is rounded. With `act_order`, the
            model then needs no list of the group of each input.
        true_sequential: Within a layer, too, calibrate each projection on what the rounded ones before it compute.
        percdamp: Damping: added to the second moments of the inputs, as a fraction of their mean.
        algorithm: `gptq`: each weight makes up for the errors of those before it, by the inputs of the calibration
            data; `rtn`: round to nearest, without data.
        correction: `dense`: also make up for how the inputs differ from those in the dense model (GPTAQ); `none`.
        op_names: Regular expressions searched in module names: which projections are quantised. Left out: all.
        excluded_op_names: Regular expressions searched in module names: which are not.

    Source:
        Frantar et al. 2023 (arXiv 2210.17323), with the options of its released code. `correction`: Li et al. 2025
        (arXiv 2504.02692).

    Example:
        >>> WeightQuantizationConfig(bits=1)
        Traceback (most recent call last):
            ...
        ValueError: bits must be in 2..8, got 1.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    act_order: bool | None = None
    static_groups: bool = False
    true_sequential: bool = False
    percdamp: float = 0.01
    algorithm: Literal["gptq", "rtn"] = "gptq"
    correction: Literal["none", "dense"] = "none"
    op_names: tuple[str, ...] | None = None
    excluded_op_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("op_names", "excluded_op_names"):
            # JSON, YAML and the command line know lists only.
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def check(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}.")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size must be -1 (one group of all inputs) or at least 1, got {self.group_size}. 64 or 128 are "
                "usual."
            )
        if not 0 < self.percdamp < math.inf:
            raise ValueError(f"percdamp must be positive, got {self.percdamp}. 0.01 is usual.")
        if self.static_groups and self.group_size == -1:
            raise ValueError("static_groups must go with a group_size, got group_size=-1: there are no groups.")
        if self.algorithm == "rtn":
            for name, off in (
                ("act_order", self.act_order is not True),
                ("static_groups", not self.static_groups),
                ("true_sequential", not self.true_sequential),
                ("correction", self.correction == "none"),
            ):
                if not off:
                    raise ValueError(
                        f"{name} must be left out with algorithm='rtn', which reads no inputs, got "
                        f"{getattr(self, name)!r}. Leave it out, or take algorithm='gptq'."
                    )
        for name in ("op_names", "excluded_op_names"):
            check_expressions(name, getattr(self, name) or ())

    @property
    def lists_groups(self) -> bool:
        """Whether a model needs the group of each input, because they are not neighbours."""
        return bool(self.act_order) and self.group_size != -1 and not self.static_groups

    def to_record(self) -> dict[str, object]:
        record = super().to_record()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
