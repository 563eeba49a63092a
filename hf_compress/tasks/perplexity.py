"""How surprised a causal language model is by windows of tokens.

The scores of all tokens of all windows never stand in memory together: with 50,000 tokens to choose from, those of one
window of 2,048 are 400 MB in single precision.

Letters: B windows, S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.modes import evaluating
from hf_compress.tasks.inputs import IGNORED


# Scores that are computed at once: 64 MB in single precision.
_SCORES = 2**24
# Tokens that go through the layers at once, in whole windows.
_TOKENS = 2**13
# Tokens on which an output layer is tried out.
_TRIED = 8


def cut(length: int, context: int, stride: int, tail: bool) -> list[range]:
    """Cut a text into windows.

    Args:
        length: Of the text, in tokens.
        context: Tokens of a window.
        stride: How far each window begins behind the one before it, in 1..context.
        tail: Whether a shorter window at the end takes what no whole one reaches.

    Example:
        >>> cut(10, context=4, stride=3, tail=False), cut(10, context=4, stride=4, tail=True)
        ([range(0, 4), range(3, 7), range(6, 10)], [range(0, 4), range(4, 8), range(8, 10)])
    """
    end = max(length - context + stride, 1) if tail else length - context + 1
    return [range(start, min(start + context, length)) for start in range(0, end, stride)]


def window_labels(ids: Sequence[int], first: int) -> list[int]:
    """The labels of a window whose tokens before `first` were counted in the windows before it."""
    return [IGNORED] * first + list(ids[first:])


def summed_losses(states: Tensor, labels: Tensor, scores: Callable[[Tensor], Tensor], num_scores: int) -> Tensor:
    """Sum the losses of the tokens of each window, in single precision and a few tokens at a time.

    Args:
        states: [B, S, ...] from which `scores` computes the scores of the token that follows.
        labels: [B, S] the tokens themselves; those that are `IGNORED`, and the first of each window, do not count.
        scores: [n, ...] -> [n, V].
        num_scores: V.

    Returns:
        [B, 2] float64 on the CPU: the sum of the negative log-likelihoods, in nats, and the number of tokens.
    """
    size = max(_SCORES // num_scores, 1)
    rows = []
    for before, targets in zip(states[:, :-1], labels[:, 1:].to(states.device), strict=True):
        counted = targets != IGNORED
        parts = zip(before[counted].split(size), targets[counted].split(size), strict=True)
        sums = [nn.functional.cross_entropy(scores(part).float(), wanted, reduction="sum") for part, wanted in parts]
        rows.append([math.fsum(float(each) for each in sums), int(counted.sum())])
    return torch.tensor(rows, dtype=torch.float64)


class WindowLosses:
    """Computes the losses of windows with one model.

    Where the model's scores are its output layer applied to its hidden states, that layer reads a few tokens at a
    time; what other models compute is asked of them window by window.

    Args:
        model: A causal language model in eval mode, maybe an exported one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head: nn.Module | None = None
        self._tried = False

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The losses of a batch.

        Args:
            inputs: Of the model, [B, S] each, on its device.
            labels: [B, S], as `summed_losses` takes them.

        Returns:
            As `summed_losses`.
        """
        if not self._tried:
            self._head, self._tried = _plain_head(self._model, inputs["input_ids"]), True
        at_once = max(_TOKENS // labels.shape[1], 1) if self._head is not None else 1
        found = []
        for start in range(0, len(labels), at_once):
            part = slice(start, start + at_once)
            found.append(self._losses({name: value[part] for name, value in inputs.items()}, labels[part]))
        return torch.cat(found)

    def _losses(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        if self._head is None:
            logits: Tensor = self._model(**inputs).logits
            return summed_losses(logits, labels, lambda part: part, logits.shape[-1])
        hidden: Tensor = self._model.base_model(**inputs)[0]
        return summed_losses(hidden, labels, self._head, self._model.config.get_text_config().vocab_size)


def _plain_head(model: PreTrainedModel, ids: Tensor) -> nn.Module | None:
    """The output layer of a model that does nothing else with its hidden states; None where it does, or has none."""
    body: Any = getattr(model, "base_model", model)
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head: nn.Module | None = find()
    if body is model or head is None:
        return None
    start = ids[:1, :_TRIED]
    wanted, found = model(input_ids=start).logits, head(body(input_ids=start)[0])
    # Some scale or bound the scores.
    near = 1e-4 * float(wanted.abs().max())
    return head if wanted.shape == found.shape and torch.allclose(found, wanted, rtol=0.0, atol=near) else None


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Sequence[int],
    context: int,
    stride: int | None = None,
    max_windows: int | None = None,
) -> dict[str, float]:
    """Measure the perplexity of a causal language model on a text.

    Args:
        model: On the device where it is measured.
        ids: The tokens of the whole text. Nothing is added to a window.
        context: Tokens of a window.
        stride: How far each window begins behind the one before it; only tokens that no earlier window held count.
            None: `context`, so that windows do not overlap.
        max_windows: Only the first ones. None: all.

    Returns:
        `perplexity`, `loss_per_token` (nats), `windows` and `predicted_tokens`. What is left behind the last whole
        window does not count.

    Raises:
        ValueError: If the text is shorter than a window, or a size is out of range.

    Source:
        The evaluation of GPTQ (arXiv 2210.17323) and of the work that follows it: the exponential of the mean loss of
        the windows, which is that of all predicted tokens, because all windows have as many.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> perplexity(LlamaForCausalLM(config), [1, 2, 3, 4, 5, 6, 7, 8], context=3)["predicted_tokens"]
        4
    """
    stride = require_windows(context, stride, max_windows)
    windows = cut(len(ids), context, stride, tail=False)[:max_windows]
    if not windows:
        raise ValueError(f"ids must hold at least one window of {context} tokens, got {len(ids)}.")
    rows = []
    with evaluating(model):
        losses = WindowLosses(model)
        for number, place in enumerate(windows):
            window = torch.tensor([list(ids[place.start : place.stop])])
            labels = torch.tensor([window_labels(window[0].tolist(), context - stride if number else 0)])
            rows.append(losses({"input_ids": window.to(model.device)}, labels))
    total, count = torch.cat(rows).sum(0).tolist()
    return {
        "perplexity": math.exp(total / count),
        "loss_per_token": total / count,
        "windows": len(windows),
        "predicted_tokens": int(count),
    }


def require_windows(context: int, stride: int | None, max_windows: int | None = None) -> int:
    """Check how a text is to be cut.

    Returns:
        The stride; `context` where it was left out.

    Raises:
        ValueError: If a size is out of range.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}.")
    if stride is not None and not 1 <= stride <= context:
        raise ValueError(f"stride must be in 1..{context}, the tokens of a window, got {stride}.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}.")
    return context if stride is None else stride
