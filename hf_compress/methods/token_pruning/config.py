"""The config of a model that drops tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_compress.core.method import MethodConfig


@dataclass(kw_only=True)
class TokenPruningConfig(MethodConfig):
    """Token pruning: tokens that receive little attention are dropped on the way through the layers.

    All fields but `temperature` and `compat` are flat.

    Args:
        prune_mode: `absolute_threshold`: a score below the layer's threshold drops a token; thresholds start on a
            linear ramp and can be learned. `topk`: a fixed fraction of the highest scores stays.
        final_token_threshold: Highest threshold of the ramp. Once thresholds exist as weights, editing it has no
            effect.
        token_keep_rate: Fraction of tokens that the last layer keeps with `topk`; at most 1. Negative values reach
            the minimum in an earlier layer.
        scoring_mode: `mean`, or `mean_norm`, an older name for `score_norm="live"`.
        threshold_ramp: `zero_based` (released code: layer 0 never prunes) or `one_based` (published text).
        score_norm: The divisor of the scores, see `token_importance`.
        score_reference_length: For `score_norm="reference"`: the divisor, in tokens.
        masking_mode: In training, `soft` multiplies by a sigmoid, which gives thresholds a gradient; `hard` really
            drops tokens. Evaluation always drops tokens.
        temperature: Width of that sigmoid, in units of scores. Kept in the record, because transformers treats a flat
            field of this name as a setting of text generation and refuses to save it.
        token_prune_stage: The kind of training that made the weights. Resuming another kind is refused.
        compat: `ltp` follows the released code where this package differs on purpose. The first token is scored and
            dropped like any other (and then gets no attention, as there); top-k may keep no token; the
            regulariser is a mean over `score_reference_length` positions of every example, padding included; weights
            and thresholds are clipped by one norm. Kept in the record.

    Source:
        LTP (arXiv 2107.00910). Unlike the released code, the first token always stays and padding never counts,
        unless `compat="ltp"`.

    Example:
        >>> TokenPruningConfig(token_keep_rate=1.5)
        Traceback (most recent call last):
            ...
        ValueError: token_keep_rate must be at most 1, got 1.5.
    """

    flat: ClassVar[tuple[str, ...]] = (
        "prune_mode",
        "final_token_threshold",
        "token_keep_rate",
        "scoring_mode",
        "threshold_ramp",
        "score_norm",
        "score_reference_length",
        "masking_mode",
        "token_prune_stage",
    )

    prune_mode: Literal["absolute_threshold", "topk"] = "absolute_threshold"
    final_token_threshold: float = 0.01
    token_keep_rate: float = 1.0
    scoring_mode: Literal["mean", "mean_norm"] = "mean"
    threshold_ramp: Literal["zero_based", "one_based"] = "zero_based"
    score_norm: Literal["reference", "live", "initial"] = "reference"
    score_reference_length: int = 128
    masking_mode: Literal["hard", "soft"] = "hard"
    temperature: float = 1e-3
    token_prune_stage: Literal["soft", "hard", "switching"] | None = None
    compat: Literal["ltp"] | None = None

    def check(self) -> None:
        if self.token_keep_rate > 1:
            raise ValueError(f"token_keep_rate must be at most 1, got {self.token_keep_rate}.")
        if self.final_token_threshold < 0:
            raise ValueError(f"final_token_threshold must not be negative, got {self.final_token_threshold}.")
        if self.score_reference_length < 1:
            raise ValueError(f"score_reference_length must be at least 1, got {self.score_reference_length}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.masking_mode == "soft" and self.prune_mode != "absolute_threshold":
            raise ValueError(f"masking_mode must be 'hard' for prune_mode={self.prune_mode!r}, got 'soft'.")
