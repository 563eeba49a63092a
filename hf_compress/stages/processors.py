"""Opening what prepares examples for a model: tokenizers and image processors."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_compress.core.errors import first_line
from hf_compress.stages.option_files import nearest
from hf_compress.tasks.task import Processor, Task


# Without any of these, transformers builds a tokenizer of the model's type with an empty vocabulary.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer; of hub names it is taken for granted."""
    return not Path(name).is_dir() or any((Path(name) / file).exists() for file in _TOKENIZER_FILES)


def no_folder(name: str) -> str:
    """The beginning of an error about a hub name: it may be meant as a folder that does not exist.

    Example:
        >>> no_folder("nowhere/near")
        "there is no folder 'nowhere/near' here. As a name on the Hub: "
    """
    place = Path(name)
    if place.exists():
        return ""
    beside = [str(path) for path in place.parent.glob("*") if path.is_dir()]
    return f"there is no folder {name!r} here.{nearest(name, beside, alike=0.75)} As a name on the Hub: "


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a hub name or folder; `ValueError` when there is none."""
    if not has_tokenizer(name):
        raise ValueError(f"No tokenizer can be opened at {name!r}: it must hold one of {', '.join(_TOKENIZER_FILES)}.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # transformers and tokenizers report a broken file as whatever it breaks first.
        raise ValueError(f"No tokenizer can be opened at {name!r}: {no_folder(name)}{first_line(error)}") from error


def open_processor(name: str, kind: type[Task]) -> Processor:
    """What prepares examples of a kind for a model: its tokenizer, or its image processor.

    Raises:
        ValueError: If there is none.
    """
    if not kind.reads_images:
        return open_tokenizer(name)
    try:
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]  # of HF
    except Exception as error:
        # transformers reports a broken file as whatever it breaks first.
        raise ValueError(
            f"No image processor can be opened at {name!r}: {no_folder(name)}{first_line(error)}"
        ) from error
    return processor


def check_vocabulary(config: PretrainedConfig, processor: Processor) -> None:
    """Raise `ValueError` when a tokenizer can produce ids that the model has no embedding for."""
    if isinstance(processor, PreTrainedTokenizerBase) and len(processor) > config.vocab_size:
        raise ValueError(
            f"The tokenizer must have at most the model's {config.vocab_size} tokens, got {len(processor)}: "
            "it belongs to another model."
        )
