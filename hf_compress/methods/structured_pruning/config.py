"""The config of a structurally pruned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hf_compress.core.method import MethodConfig


@dataclass(kw_only=True)
class StructuredPruningConfig(MethodConfig):
    """Fewer attention heads and feed-forward neurons, chosen and corrected without retraining.

    Args:
        mac_ratio: Fraction of the multiply-accumulates that is kept, in (0, 1].
        selection: How heads and neurons are ranked. `interpolative`: pivoted decomposition of their activations;
            `fisher`: mask search on squared gradients (needs labels in the data); `magnitude`: norm of their weights;
            `random`.
        correction: Fold what the removed units carried into the output projection: least squares on the kept units,
            or with `fisher` one least-squares scale for each kept unit, as its authors do.
        allocation: How much each layer loses. `tolerance`: one relative residual for all layers; `uniform`: the same
            fraction everywhere; `divergence`: what moves the outputs least for what it saves, measured
            without labels by cutting each sublayer alone (seven passes over 2,048 tokens each); how much falls to
            heads is then decided with all sublayers cut together.
        target: What each cut sublayer is fitted to. `self`: its own output; `dense`: what residual and output sum to
            in the dense model, minus the residual as it is now. `dense` visits the layers in order, whatever `order`
            says, and with `interpolative` removes the units whose loss hurts the output least.
        order: When statistics are taken. `one_shot`: all from the intact model; `sequential`: each layer sees the
            layers below it already pruned.
        center: Decompose deviations from the mean and fold the mean into the bias of the output projection.
        prune_heads: Whether attention heads may be removed.
        prune_neurons: Whether feed-forward neurons may be removed.
        min_heads: How many heads every layer keeps at least. A layer without heads adds its bias only; so does one
            without neurons.
        min_neurons: How many neurons every layer keeps at least.
        sublayer_cost: Fixed cost of each sublayer that is left, as a fraction of the arithmetic of an average one;
            only with `divergence`, and with `min_heads=0` or `min_neurons=0`. It makes small sublayers go as a whole,
            because at batch 1 they take time however narrow they are. It does not count in `mac_ratio`.
        fold_norms: Fold the normalisation of each sublayer that has nothing left into the one before it, so that
            nothing of the sublayer remains; with `min_heads=0` or `min_neurons=0`, for encoders that normalise after
            each sublayer. The outputs move a little, so train afterwards.
        round_to: Keep a multiple of this many neurons in each layer (up to its full width).
        seq_len: Tokens in a sequence, for the MAC count. Left out: the mean unpadded length of the calibration data.
        ridge: Regularisation of the correction, as a fraction of the mean diagonal of the Gram matrix; 0 refuses
            calibration sets with fewer than two tokens per neuron.
        seed: Random seed of the selection `random`.
        heads_per_layer, neurons_per_layer: Filled in by `compress`: how many each layer keeps. Heads are counted as
            key-value heads.
        tolerance: Filled in by `compress`: the largest relative residual of a removed unit.

    Source:
        Flynn et al. 2024 (arXiv 2406.00061); the method's README says how the rules that the paper leaves open were
        chosen.

    Example:
        >>> StructuredPruningConfig(mac_ratio=1.5)
        Traceback (most recent call last):
            ...
        ValueError: mac_ratio must be in (0, 1], got 1.5.
    """

    # Fields of older records. They said how activations were summarised, which does not change the model's shape.
    retired: ClassVar[tuple[str, ...]] = ("route", "sketch_rows")

    mac_ratio: float = 0.5
    selection: Literal["interpolative", "fisher", "magnitude", "random"] = "interpolative"
    correction: bool = True
    allocation: Literal["tolerance", "uniform", "divergence"] = "tolerance"
    target: Literal["self", "dense"] = "self"
    order: Literal["one_shot", "sequential"] = "one_shot"
    center: bool = False
    prune_heads: bool = True
    prune_neurons: bool = True
    min_heads: int = 1
    min_neurons: int = 8
    sublayer_cost: float = 0.0
    fold_norms: bool = False
    round_to: int = 1
    seq_len: float | None = None
    ridge: float = 0.0
    seed: int = 0
    heads_per_layer: list[int] | None = field(default=None, metadata={"output": True})
    neurons_per_layer: list[int] | None = field(default=None, metadata={"output": True})
    tolerance: float | None = field(default=None, metadata={"output": True})

    @property
    def walks(self) -> bool:
        """Whether layers are visited in order, each with what the layers before it now compute."""
        return self.order == "sequential" or self.target == "dense"

    def check(self) -> None:
        if not 0 < self.mac_ratio <= 1:
            raise ValueError(f"mac_ratio must be in (0, 1], got {self.mac_ratio}.")
        for name, least in (("min_heads", 0), ("min_neurons", 0), ("round_to", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.seq_len is not None and self.seq_len <= 0:
            raise ValueError(f"seq_len must be positive, got {self.seq_len}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2**63 - 1, got {self.seed}.")
        if self.sublayer_cost < 0:
            raise ValueError(f"sublayer_cost must not be negative, got {self.sublayer_cost}.")
        if self.sublayer_cost and self.allocation != "divergence":
            raise ValueError(
                f"sublayer_cost must be 0 with allocation={self.allocation!r}, got {self.sublayer_cost}: only "
                "'divergence' weighs what a sublayer is worth against its cost."
            )
        if self.sublayer_cost and self.min_heads and self.min_neurons:
            raise ValueError(
                f"sublayer_cost must go with min_heads=0 or min_neurons=0, got {self.sublayer_cost} with minima of "
                f"{self.min_heads} and {self.min_neurons}: no sublayer can go as a whole."
            )
        if self.fold_norms and self.min_heads and self.min_neurons:
            raise ValueError(
                f"fold_norms must go with min_heads=0 or min_neurons=0, got minima of {self.min_heads} and "
                f"{self.min_neurons}: no sublayer can go as a whole."
            )
        if self.ridge < 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}.")
        if not (self.prune_heads or self.prune_neurons) and self.mac_ratio < 1:
            raise ValueError(
                "prune_heads or prune_neurons must be true when mac_ratio is below 1: nothing else can be removed."
            )
        if self.selection == "fisher" and (self.order == "sequential" or self.center):
            raise ValueError(
                "selection='fisher' must go with order='one_shot' and center=False: it ranks by gradients of the "
                "intact model and reads no activations. Leave order and center out."
            )
        if self.selection == "fisher" and self.round_to != 1:
            raise ValueError(
                f"round_to must be 1 with selection='fisher' (its search exchanges single neurons), got "
                f"{self.round_to}. Leave round_to out, or take another selection."
            )
        if self.target == "dense" and (self.selection == "fisher" or self.center or not self.correction):
            raise ValueError(
                "target='dense' must go with selection 'interpolative', 'magnitude' or 'random', correction=True and "
                "center=False: it fits output projections anew, their biases included. Leave the others out."
            )
        if self.selection == "fisher" and self.allocation == "divergence":
            raise ValueError(
                "allocation must be 'tolerance' or 'uniform' with selection='fisher', got 'divergence': the search "
                "ranks the units of all layers against each other. Leave allocation out."
            )
        for name in ("heads_per_layer", "neurons_per_layer"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes, default=-1) < 0:
                raise ValueError(f"{name} must hold a size of at least 0 for each layer, got {sizes}.")
