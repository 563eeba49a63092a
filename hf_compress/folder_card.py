"""Writes the README.md of a saved model: its steps, and how to open it. The Hub shows it as the model card."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import reprlib
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.architectures import base_of
from hf_compress.core.engines import is_sharded
from hf_compress.core.record import quantized_by_another, record_of
from hf_compress.methods import METHODS


logger = logging.getLogger(__name__)

FILE = "README.md"
_MARK = "<!-- Written by hf_compress at every save. Remove this line to keep your own text. -->"
# The first line of the cards that transformers' Trainer writes; the Trainer overwrites any card.
_TRAINERS_MARK = "<!-- This model card has been generated automatically"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Lists of many thousand numbers are for programs, which read them in config.json.
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxstring = 200, 60

_OPENING = """## How to open it

```python
import hf_compress  # before from_pretrained: it rebuilds the layers that the record in config.json names
from transformers import {imports}

model = {auto}.from_pretrained("path or name of this model")
```

Without the import, transformers knows nothing of the record (`quantization_config` in `config.json`). It then reports
an unknown quantization type and weights of other sizes (`MISMATCH`), or opens a dense model that computes something
else. Do not delete `quantization_config`, as its message advises: install the package hf_compress and import it.
"""


def may_be_replaced(file: Path) -> bool:
    """Whether a README.md was written by a program or does not exist."""
    if not file.is_file():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    return _MARK in text or _TRAINERS_MARK in text


def steps_with_settings(config: PretrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """List the steps of a model, each with its two main settings and those that are not the default."""
    result = []
    for step in [] if quantized_by_another(config) else record_of(config)["steps"]:
        kind = METHODS[step["method"]].config_class
        defaults = kind()
        flat = {name: getattr(config, name) for name in kind.flat if hasattr(config, name)}
        values = {field.name: {**step, **flat}.get(field.name) for field in dataclasses.fields(kind)}
        # JSON knows no tuples.
        usual = {name: getattr(defaults, name) for name in values}
        usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
        # The first fields of a config are the main ones: how much is kept, which pattern, how many slots.
        main = list(values)[:2]
        shown = {n: v for n, v in values.items() if v is not None and (n in main or v != usual[n])}
        result.append((step["method"], shown))
    return result


def _dense_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of a model of the same class and config without a record."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Nothing is drawn on the meta device, but any class may draw random numbers, and a training may be running.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(parameter.numel() for parameter in type(model)(config).parameters())


def _sizes(model: PreTrainedModel) -> str:
    parameters = list(model.parameters())
    now = sum(parameter.numel() for parameter in parameters)
    # One process writes the card: it cannot count what others hold.
    counted = not any(is_sharded(parameter) for parameter in parameters)
    nonzero = f"{sum(int(parameter.count_nonzero()) for parameter in parameters):,}" if counted else ""
    rows = [f"| this model | {now:,} | {nonzero} |"]
    # A class outside transformers may need more than a config.
    if type(model).__module__.startswith("transformers."):
        rows.insert(0, f"| the dense model | {_dense_parameters(model):,} | |")
    return "\n".join(["| | parameters | not zero |", "|---|---|---|", *rows])


def _auto_class(model: PreTrainedModel) -> str:
    kind = type(model).__name__
    head = re.search(r"For[A-Z]\w+$", kind)
    name = f"AutoModel{head.group()}" if head else "AutoModelForCausalLM" if "LMHead" in kind else "AutoModel"
    return name if hasattr(transformers, name) else kind


def _base_model(model: PreTrainedModel) -> str | None:
    """Find the Hub name of the model that this one was made from, through the folders in between; None if unknown."""
    name = getattr(model.config, "_name_or_path", "") or ""
    if Path(name).is_dir():
        card = Path(name, FILE)
        return ModelCard.load(card).data.base_model if card.is_file() and _MARK in card.read_text("utf-8") else None
    return name if _HUB_NAME.fullmatch(name) else None


def tags_of(model: PreTrainedModel) -> list[str]:
    """`hf_compress` and the names of the methods."""
    return ["hf_compress", *dict.fromkeys(name for name, _ in steps_with_settings(model.config))]


def compression_section(model: PreTrainedModel, has_tokenizer: bool) -> str:
    """Describe in Markdown the steps of a model and how to open it; without a record, only the latter."""
    steps = steps_with_settings(model.config)
    auto = _auto_class(model)
    if not steps:
        # A class of ours is unknown to transformers alone.
        ours = type(model).__module__.startswith("hf_compress.")
        what = (
            f"A student of hf_compress: `{type(model).__name__}`, which transformers knows after the import."
            if ours
            else "The model has not been compressed, or plain transformers opens its compressed form."
        )
        imports = (
            "import hf_compress  # makes the class known\n" if ours else ""
        ) + f"from transformers import {auto}"
        return f'{what}\n\n```python\n{imports}\n\nmodel = {auto}.from_pretrained("path or name")\n```\n'
    lines = []
    for number, (name, settings) in enumerate(steps, start=1):
        paper = METHODS[name].paper
        values = {
            key: f"{value:.4g}" if isinstance(value, float) else _SHORT.repr(value) for key, value in settings.items()
        }
        shown = ", ".join(f"`{key}={value}`" for key, value in values.items()) or "the default settings"
        lines.append(f"{number}. **{name}** ([{paper.title}](https://arxiv.org/abs/{paper.identifier})): {shown}")
    opening = _OPENING.format(auto=auto, imports=f"{auto}, AutoTokenizer" if has_tokenizer else auto)
    if has_tokenizer:
        line = 'tokenizer = AutoTokenizer.from_pretrained("path or name of this model")\n```'
        opening = opening.replace("\n```\n\nWithout", f"\n{line}\n\nWithout")
    return "\n\n".join(["## What was done", "\n".join(lines), _sizes(model), opening])


def write_card(folder: str | Path, model: Any, target: str | Path | None = None) -> None:
    """Write a README.md beside a saved model, unless a person has written one.

    Args:
        folder: Folder of the model's files.
        model: The saved model; only models of transformers get a card.
        target: Folder that the files will be moved to; a README.md that a person wrote there stays.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_card(place, BertModel(tiny))
        ...     Path(place, "README.md").read_text().splitlines()[1]
        'library_name: transformers'
    """
    try:
        _write(folder, model, target)
    except Exception as error:
        # No error may stop the save: the model is worth more than its description.
        logger.warning("%s of %s could not be written: %s", FILE, folder if target is None else target, error)


def _write(folder: str | Path, model: Any, target: str | Path | None) -> None:
    places = [Path(folder, FILE), *([Path(target, FILE)] if target is not None else [])]
    if not isinstance(model, PreTrainedModel) or not all(may_be_replaced(file) for file in places):
        return
    found = Path(folder, "tokenizer_config.json").is_file()
    data = ModelCardData(library_name="transformers", base_model=_base_model(model), tags=tags_of(model))
    title = f"# {type(model).__name__}" + (", compressed with hf_compress" if tags_of(model)[1:] else "")
    body = "\n\n".join([_MARK, title, compression_section(model, found)])
    places[0].write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")


def add_compression(file: str | Path, model: Any) -> None:
    """Add the steps of a model to the card that transformers' Trainer has written, before the Trainer's text."""
    core = base_of(model)
    if not isinstance(core, PreTrainedModel) or not tags_of(core)[1:]:
        return
    card = ModelCard.load(file)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags_of(core)]))
    found = Path(file).with_name("tokenizer_config.json").is_file()
    text = "\n\n".join([_MARK, compression_section(core, found), card.text.lstrip()])
    Path(file).write_text(f"---\n{card.data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
