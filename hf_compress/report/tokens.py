"""Which words survive each layer of a model that drops tokens, as a page to look at."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
    return trace_inputs(model, tokenizer, tokenizer(text, return_tensors="pt", truncation=True))


@torch.no_grad()
def trace_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Any]) -> TokenTrace:
    """As `trace_tokens`, of an encoded example: `input_ids` [1, tokens] and maybe `token_type_ids`."""
    arguments = forward_state(model)
    if (state := state_in(arguments)) is None:
        raise ValueError(f"model must drop tokens, got a {type(model).__name__} without token pruning.")
    base = model.base_model
    with evaluating(model):
        read = {name: inputs[name].to(base.device) for name in ("input_ids", "token_type_ids") if name in inputs}
        base(**read, **arguments)
    tokens = list(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()))
    kept = [state.kept_after(layer.index) for layer in layers_of(model)]
    # A layer without an answer keeps every token.
    return TokenTrace(tokens, [[True] * len(tokens) if mask is None else mask[0].tolist() for mask in kept])


def surviving_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> list[dict[str, Any]]:
    """How far the tokens of encoded examples come through a model.

    Args:
        model: Any; for one that drops no tokens the list is empty.
        tokenizer: Its own.
        rows: Encoded by it, without padding.

    Returns:
        For each row `tokens`, for each of them the number of layers that it leaves (`layers`), and `depth`: how many
        layers the model has.
    """
    if state_in(forward_state(model)) is None:
        return []
    found = []
    for row in rows:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids") if name in row}
        trace = trace_inputs(model, tokenizer, inputs)
        layers = [sum(kept) for kept in zip(*trace.kept, strict=True)]
        found.append({"tokens": trace.tokens, "layers": layers, "depth": len(trace.kept)})
    return found


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
