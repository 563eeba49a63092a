"""Cuts word embeddings and output layer of a live model to some tokens.

Letters: V tokens, D embedding size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from hf_compress.core.data_needs import Data
from hf_compress.core.errors import BROKEN_FILE, one_line
from hf_compress.core.positions import position_offset
from hf_compress.methods.vocabulary_pruning.config import VocabularyPruningConfig
from hf_compress.methods.vocabulary_pruning.corpus import corpus_texts
from hf_compress.methods.vocabulary_pruning.selection import kept_ids


# Lists of ids in generation configs; their other fields with ids are named like those of model configs.
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def word_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The word embeddings of a model, [V, D].

    Raises:
        ValueError: If it has none, as a model for images or sounds, or two of them.
    """
    try:
        found: Any = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise ValueError(f"model must have word embeddings, got {type(model).__name__}, which has none.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be an encoder or a decoder, got {type(model).__name__}, which is both.")
    return found


def check(model: PreTrainedModel, config: VocabularyPruningConfig) -> None:
    """Refuse a model without word embeddings, ids that it does not have, and a config without a corpus.

    Raises:
        ValueError: Says what is missing.
    """
    size = word_embeddings(model).num_embeddings
    if config.kept_ids is None:
        if config.corpus is None:
            raise ValueError("corpus must name files of texts, got none: their tokens stay.")
        if not getattr(model.config, "_name_or_path", ""):
            raise ValueError(
                "corpus must be read with the model's tokenizer, but the model was not opened from a folder: call "
                "prune_vocabulary(model, tokenizer, texts)."
            )
    elif config.ids[-1] >= size:
        raise ValueError(f"kept_ids must be ids of the model's {size} tokens, got {config.ids[-1]}.")


def needed_ids(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configs name, and those that must come before the padding id."""
    embeddings = word_embeddings(model)
    found = {index for config in _configs(model) for _, ids in _named_ids(config) for index in ids}
    if embeddings.padding_idx is not None:
        found.add(embeddings.padding_idx)
    # RoBERTa counts positions from the padding id: it may not change.
    found.update(range(position_offset(model)))
    return {index for index in found if 0 <= index < embeddings.num_embeddings}


def compress(model: PreTrainedModel, config: VocabularyPruningConfig, data: Data | None) -> VocabularyPruningConfig:
    """Cut a model to the kept tokens, or to those that its own tokenizer finds in the corpus."""
    kept = config.ids if config.kept_ids is not None else _ids_of_corpus(model, config)
    kept = sorted({*kept, *needed_ids(model)})
    cut_vocabulary_(model, kept)
    names = None if config.corpus is None else [Path(name).name for name in config.corpus]
    return dataclasses.replace(config, corpus=names, kept_ids=kept)


def _ids_of_corpus(model: PreTrainedModel, config: VocabularyPruningConfig) -> list[int]:
    name = model.config._name_or_path
    with one_line(f"No tokenizer can be opened at {name!r}", *BROKEN_FILE):
        tokenizer = AutoTokenizer.from_pretrained(name)
    kept = kept_ids(tokenizer, corpus_texts(config.corpus or ()), config.min_count, config.characters)
    if kept[-1] >= word_embeddings(model).num_embeddings:
        raise ValueError(f"The tokenizer at {name!r} has more tokens than the model: it belongs to another one.")
    return kept


@torch.no_grad()
def cut_vocabulary_(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep some rows of the word embeddings and of the output layer, tied or not; configs say so.

    Args:
        model: A live model.
        kept: The ids that stay, ascending, `needed_ids` among them.
    """
    embeddings = word_embeddings(model)
    before, padding = embeddings.num_embeddings, embeddings.padding_idx
    rows = torch.tensor(kept, device=embeddings.weight.device)
    places = {index: place for place, index in enumerate(kept)}
    cut = {
        id(old): nn.Parameter(old.detach()[rows].clone(), requires_grad=old.requires_grad)
        for old in _rows_of_tokens(model, embeddings)
    }
    for module in model.modules():
        holder: Any = module
        for name, old in list(module._parameters.items()):
            if id(old) in cut:
                module._parameters[name] = cut[id(old)]
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = len(kept)
                elif isinstance(module, nn.Linear):
                    module.out_features = len(kept)
        if getattr(module, "vocab_size", None) == before:
            holder.vocab_size = len(kept)
        if padding is not None and not isinstance(module, nn.Embedding) and vars(module).get("padding_idx") == padding:
            holder.padding_idx = places[padding]
    embeddings.padding_idx = None if padding is None else places[padding]
    _renumber_configs_(model, places)


def _rows_of_tokens(model: PreTrainedModel, embeddings: nn.Embedding) -> Iterator[Tensor]:
    """The parameters whose rows are tokens: word embeddings, output layer, and the biases beside it."""
    yield embeddings.weight
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    if output is None:
        return
    for module in model.modules():
        if module is output or any(child is output for child in module.children()):
            for parameter in module._parameters.values():
                if parameter is not None and len(parameter) == embeddings.num_embeddings:
                    yield parameter


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configs that name ids: of the model, of its part for texts, of generation; each once."""
    config = model.config
    found = [config, config.get_text_config(), getattr(model, "generation_config", None)]
    return list({id(each): each for each in found if each is not None}.values())


def _named_ids(config: Any) -> Iterator[tuple[str, list[int]]]:
    """Name -> ids of each field with ids of special tokens."""
    for name, value in list(vars(config).items()):
        if name.endswith(("_token_id", "_token_ids")) and value is not None:
            yield name, [value] if isinstance(value, int) else list(value)


def _renumber_configs_(model: PreTrainedModel, places: dict[int, int]) -> None:
    if getattr(model, "generation_config", None) is not None:
        # Restored after a failure by putting the old object back.
        model.generation_config = copy.deepcopy(model.generation_config)
    for config in _configs(model):
        for name, ids in list(_named_ids(config)):
            new = [places.get(index, index) for index in ids]
            setattr(config, name, new[0] if isinstance(getattr(config, name), int) else new)
        for name in _ID_LISTS:
            if getattr(config, name, None):
                setattr(config, name, [places[index] for index in getattr(config, name) if index in places])
    model.config.get_text_config().vocab_size = len(places)


def rebuild(model: PreTrainedModel, config: VocabularyPruningConfig) -> None:
    """Nothing to change: the config alone gives a skeleton the right number of tokens.

    It may have more by now: `resize_token_embeddings` adds new ones.

    Raises:
        ValueError: If the config was never applied.
    """
    _ = config.ids


def plain(model: PreTrainedModel, config: VocabularyPruningConfig) -> dict[str, Any]:
    """Nothing to add: the model's config says all already."""
    return {}
