"""Which words survive each layer of a model that drops tokens, as a page to look at."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.architectures import layers_of
from hf_compress.core.forward_state import forward_state, state_in
from hf_compress.core.modes import evaluating


@dataclass(frozen=True)
class TokenTrace:
    """The tokens of a text, and the layers that keep them.

    Args:
        tokens: As the tokenizer cut them.
        kept: For each layer, for each token, whether it left the layer.
    """

    tokens: list[str]
    kept: list[list[bool]]


@torch.no_grad()
def trace_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> TokenTrace:
    """Run a text through a model and note which tokens leave each layer.

    Args:
        model: With token pruning.
        tokenizer: Its own.
        text: Cut where it is longer than the model reads.

    Returns:
        The tokens, and for each layer which of them it keeps.

    Raises:
        ValueError: If the model does not drop tokens.

    Example:
        >>> import hf_compress as hc
        >>> traces = [hc.trace_tokens(model, tokenizer, text) for text in texts]  # doctest: +SKIP
        >>> hc.write_token_page("words.html", traces)  # doctest: +SKIP
    """
    arguments = forward_state(model)
    if (state := state_in(arguments)) is None:
        raise ValueError(f"model must drop tokens, got a {type(model).__name__} without token pruning.")
    inputs = tokenizer(text, return_tensors="pt", truncation=True)
    base = model.base_model
    with evaluating(model):
        base(input_ids=inputs["input_ids"].to(base.device), **arguments)
    tokens = list(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()))
    kept = [state.kept_after(layer.index) for layer in layers_of(model)]
    # A layer without an answer keeps every token.
    return TokenTrace(tokens, [[True] * len(tokens) if mask is None else mask[0].tolist() for mask in kept])


def write_token_page(file: str | Path, traces: list[TokenTrace], title: str = "Which words survive") -> None:
    """Write an HTML page: one table a text, one row a layer, dropped tokens struck out from the layer that drops them.

    Args:
        file: Written anew.
        traces: Of `trace_tokens`.
        title: Heading.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "words.html"
        >>> write_token_page(file, [TokenTrace(["a", "film"], [[True, True], [False, True]])])
        >>> "after layer 1: 1" in file.read_text()
        True
    """
    style = (
        "body{font:14px sans-serif;margin:2em}td{padding:2px 5px;text-align:center}"
        "th{text-align:right;padding-right:1em;font-weight:normal;color:#666}"
        ".gone{color:#bbb;text-decoration:line-through}.kept{background:#cfe8fc}"
    )
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    for trace in traces:
        parts.append("<table>")
        for layer, row in enumerate(trace.kept):
            cells = "".join(
                f"<td class={'kept' if keep else 'gone'}>{html.escape(token)}</td>"
                for token, keep in zip(trace.tokens, row, strict=True)
            )
            parts.append(f"<tr><th>after layer {layer}: {sum(row)}</th>{cells}</tr>")
        parts.append("</table><br>")
    Path(file).write_text("".join(parts), encoding="utf-8")
