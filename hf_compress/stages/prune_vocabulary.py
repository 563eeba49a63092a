"""Drop the tokens that a corpus never uses from a model and its tokenizer, and save both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hf_compress.api import steps_of
from hf_compress.core.cost import count_size
from hf_compress.methods.vocabulary_pruning import VocabularyPruningConfig
from hf_compress.methods.vocabulary_pruning.corpus import corpus_texts
from hf_compress.methods.vocabulary_pruning.modeling import word_embeddings
from hf_compress.stages.arguments import DeviceArguments, OutputArguments, StageArguments
from hf_compress.stages.models import ModelArguments, has_head, open_pair, open_pretrained
from hf_compress.stages.saved import save_stage
from hf_compress.tasks.inputs import tokenizer_for
from hf_compress.vocabulary import prune_vocabulary


@dataclass(frozen=True, kw_only=True)
class PruneVocabulary(StageArguments):
    """What `prune_model_vocabulary` takes.

    Args:
        model: Any model with word embeddings.
        vocabulary: Which tokens stay.
        output: Where the smaller model and its tokenizer go.
        device: Where it is computed.
    """

    model: ModelArguments
    vocabulary: VocabularyPruningConfig
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary.corpus is None:
            raise ValueError("corpus must name files of texts, got none: their tokens stay.")


def prune_model_vocabulary(arguments: PruneVocabulary) -> dict[str, Any]:
    """Make a model and its tokenizer smaller by the tokens that a corpus never uses, and save them in one folder.

    Returns:
        The recorded step, how many texts were read, the tokens and the size before and after, and the seconds it took.

    Raises:
        ValueError: If the corpus cannot be read, or model or tokenizer cannot lose tokens.
    """
    config = arguments.vocabulary
    assert config.corpus is not None
    texts = corpus_texts(config.corpus)
    name = arguments.model.model_name_or_path
    processor, model = open_pair(arguments.model) if has_head(name) else open_pretrained(arguments.model)
    # Of an image model this says more than the lack of a tokenizer.
    word_embeddings(model)
    arguments.device.place_(model)
    before, start = {"tokens": word_embeddings(model).num_embeddings, **count_size(model)}, time.perf_counter()
    model, tokenizer = prune_vocabulary(model, tokenizer_for(processor), texts, config)
    results = {
        "step": steps_of(model)[-1],
        "texts": len(texts),
        "before": before,
        "after": {"tokens": word_embeddings(model).num_embeddings, **count_size(model)},
        "seconds": round(time.perf_counter() - start, 3),
    }
    save_stage(arguments.output.output_dir, model, tokenizer, results)
    return results
