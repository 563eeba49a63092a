"""Sums up a comparison of two models in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


# A median below this is called "not faster": repeats of one and the same model differ by about as much.
_FASTER = 1.05


def is_faster(speedup: float) -> bool:
    """Whether a median speed-up is more than the difference between repeats of one and the same model."""
    return speedup >= _FASTER


def verdict(batch_size: int, speedup: float, mac_ratio: float | None, lowest: float | None = None) -> str:
    """Write one sentence that compares the measured speed-up with the arithmetic.

    Args:
        batch_size: Of the measurement.
        speedup: Measured, above 1 is faster than the baseline.
        mac_ratio: Multiply-accumulates kept, of the baseline's; None: not counted.
        lowest: Speed-up of the worst round; None: not known.

    Example:
        >>> verdict(32, 1.8, 0.5)
        'batch 32: 1.80x faster measured, 2.00x fewer MACs'
        >>> verdict(1, 0.98, 0.5)
        'NOT faster at batch 1: 0.98x measured, 2.00x fewer MACs'
        >>> verdict(8, 1.4, 0.5, lowest=0.7)
        'batch 8: 1.40x faster in the median, but slower in some rounds (0.70x): measure longer, 2.00x fewer MACs'
    """
    if mac_ratio is None:
        promised = "MACs not counted"
    elif abs(mac_ratio - 1) < 0.005:
        promised = "the same MACs"
    else:
        promised = f"{1 / mac_ratio:.2f}x fewer MACs" if mac_ratio < 1 else f"{mac_ratio:.2f}x more MACs"
    if not is_faster(speedup):
        return f"NOT faster at batch {batch_size}: {speedup:.2f}x measured, {promised}"
    if lowest is not None and lowest < 1:
        doubt = f"faster in the median, but slower in some rounds ({lowest:.2f}x): measure longer"
        return f"batch {batch_size}: {speedup:.2f}x {doubt}, {promised}"
    return f"batch {batch_size}: {speedup:.2f}x faster measured, {promised}"


def second_verdict(batch_size: int, speedup: float, name: str, lowest: float | None = None) -> str:
    """Write one sentence on the measured speed-up over the second baseline.

    Args:
        batch_size, speedup, lowest: As for `verdict`.
        name: Of the second baseline.

    Example:
        >>> second_verdict(1, 2.3, "dense int8")
        'batch 1: 2.30x as fast as dense int8'
        >>> second_verdict(1, 0.9, "dense int8")
        'NOT faster than dense int8 at batch 1: 0.90x measured'
    """
    if not is_faster(speedup):
        return f"NOT faster than {name} at batch {batch_size}: {speedup:.2f}x measured"
    doubt = f", but slower in some rounds ({lowest:.2f}x)" if lowest is not None and lowest < 1 else ""
    return f"batch {batch_size}: {speedup:.2f}x as fast as {name}{doubt}"


def quality_verdict(
    metric: str, before: float, after: float, error: float | None = None, lower_is_better: bool = False
) -> str:
    """Write one clause on the quality that was lost or gained, and whether that is more than chance.

    Args:
        metric: Its name.
        before, after: Of the baseline and of the model.
        error: Standard error of the difference; None: not known.
        lower_is_better: Whether a lower value is the better one, as of perplexity.

    Example:
        >>> quality_verdict("accuracy", 0.77, 0.53, 0.02)
        'LOST 0.2400 accuracy (0.7700 -> 0.5300, standard error 0.0200)'
        >>> quality_verdict("accuracy", 0.92, 0.915, 0.01)
        'accuracy 0.9200 -> 0.9150 (a difference within two standard errors of 0.0100)'
        >>> quality_verdict("perplexity", 36.0, 41.5, 0.5, lower_is_better=True)
        'perplexity WORSE by 5.5000 (36.0000 -> 41.5000, standard error 0.5000)'
        >>> quality_verdict("accuracy", 0.92, 0.92, 0.0)
        'the same accuracy (0.9200), with no example gained or lost'
    """
    change, numbers = after - before, f"{before:.4f} -> {after:.4f}"
    if change == 0:
        # An error of 0 only says that these examples show no difference, not that there is none.
        return f"the same {metric} ({after:.4f})" + (", with no example gained or lost" if error == 0 else "")
    if error is not None and abs(change) <= 2 * error:
        return f"{metric} {numbers} (a difference within two standard errors of {error:.4f})"
    known = f", standard error {error:.4f}" if error is not None else ""
    if lower_is_better:
        return f"{metric} {'WORSE' if change > 0 else 'better'} by {abs(change):.4f} ({numbers}{known})"
    return f"{'LOST' if change < 0 else 'gained'} {abs(change):.4f} {metric} ({numbers}{known})"


def only_answer_verdict(
    baseline: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, is_baseline: bool = False
) -> str:
    """Write one clause on models that answer one class to every example; empty where neither does.

    Args:
        baseline: Name of the baseline.
        before, after: The `only_answer` of the baseline and of the model, as `Entry` holds them.
        is_baseline: Whether the model is the baseline itself.

    Example:
        >>> bad = {"answer": "bad", "right": 0.73}
        >>> only_answer_verdict("dense", None, bad)
        "ONE CLASS: all its answers are 'bad' (right for 0.7300 of the examples), which takes no model"
        >>> only_answer_verdict("dense", bad, bad)
        "ONE CLASS: all answers of dense and its own are 'bad' (right for 0.7300 of the examples): nothing is compared"
    """

    def told(who: str, only: Mapping[str, Any]) -> str:
        return f"{who} are {only['answer']!r} (right for {only['right']:.4f} of the examples)"

    if before is None or is_baseline:
        return f"ONE CLASS: {told('all its answers', after)}, which takes no model" if after is not None else ""
    if after is None:
        return f"ONE CLASS: {told(f'all answers of {baseline}', before)}, no baseline to compare with"
    if before == after:
        return f"ONE CLASS: {told(f'all answers of {baseline} and its own', after)}: nothing is compared"
    return (
        f"ONE CLASS: {told(f'all answers of {baseline}', before)}, {told('all its own', after)}: nothing is compared"
    )
