"""Prunes the vocabulary of a model and of its tokenizer together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api import compress, steps_of
from hf_compress.methods.vocabulary_pruning import METHOD, VocabularyPruningConfig
from hf_compress.methods.vocabulary_pruning.modeling import needed_ids, word_embeddings
from hf_compress.methods.vocabulary_pruning.selection import count_covered, kept_ids
from hf_compress.methods.vocabulary_pruning.trimming import trimmed


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    config: VocabularyPruningConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Drop the tokens that texts never use from a model and its tokenizer.

    Texts of the corpus are read by the same tokens as before, under other ids, and the model says the same of them,
    to rounding; this is checked for every text. Other texts are put together of the tokens that are left.

    Args:
        model: With word embeddings; changed in place.
        tokenizer: Its own, a fast one of the type WordPiece, BPE or Unigram; not changed.
        texts: The corpus, each text as the tokenizer takes it.
        config: `min_count` and `characters`; its `corpus` is only recorded.

    Returns:
        The same model, and the smaller tokenizer. Save both into one folder.

    Raises:
        ValueError: Before the model is changed, if there is no text, model and tokenizer do not belong together, or
            one of them cannot lose tokens.

    Source:
        Abdaoui et al. 2020 (arXiv 2010.05609), who keep the tokens of one language.

    Example:
        >>> import hf_compress as hc                                            # doctest: +SKIP
        >>> model, tokenizer = hc.prune_vocabulary(model, tokenizer, texts)     # doctest: +SKIP
    """
    config = config or VocabularyPruningConfig()
    corpus = list(texts)
    before = word_embeddings(model).num_embeddings
    kept = kept_ids(tokenizer, corpus, config.min_count, config.characters)
    if kept[-1] >= before or len(tokenizer) > before:
        raise ValueError(
            f"The tokenizer must have at most the model's {before} tokens, got {len(tokenizer)}: it belongs to "
            "another model."
        )
    kept = sorted({*kept, *needed_ids(model)})
    smaller = trimmed(tokenizer, kept)
    count_covered(tokenizer, smaller, kept, corpus)
    return compress(model, dataclasses.replace(config, kept_ids=kept)), smaller


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Give a tokenizer the tokens that the last vocabulary pruning of its model has kept.

    Args:
        tokenizer: As it was before that step; not changed.
        model: Its record says which tokens stayed.

    Returns:
        The smaller tokenizer.

    Raises:
        ValueError: If the model has no such step, or the tokenizer is not the one that it was made for.
    """
    steps = [step for step in steps_of(model) if step["method"] == METHOD.name]
    if not steps:
        raise ValueError(f"model must have gone through {METHOD.name}, got none in its record.")
    kept = VocabularyPruningConfig(kept_ids=steps[-1]["kept_ids"]).ids
    return trimmed(tokenizer, kept)
