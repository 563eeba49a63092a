"""Writes the README.md of a saved model: its steps, and how to open it. The Hub shows it as the model card."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.card_sections import (
    REPORT_FILE,
    citation_section,
    entry_of,
    limits_section,
    measured_section,
    read_report,
    training_of,
    training_section,
)
from hf_compress.core.architectures import base_of
from hf_compress.core.cost import weights_of
from hf_compress.core.engines import is_sharded
from hf_compress.core.record import quantized_by_another, record_of
from hf_compress.methods import METHODS


logger = logging.getLogger(__name__)

FILE = "README.md"
_MARK = "<!-- Written by hf_compress at every save. Remove this line to keep your own text. -->"
# The first line of the cards that transformers' Trainer writes; the Trainer overwrites any card.
_TRAINERS_MARK = "<!-- This model card has been generated automatically"
# Class that opens a model -> what the Hub calls its task.
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModel": "feature-extraction",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Lists of many thousand numbers are for programs, which read them in config.json.
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxstring = 200, 60

_OPENING = """## How to open it

```python
import hf_compress  # before from_pretrained: it rebuilds the layers that the record in config.json names
from transformers import {imports}

model = {auto}.from_pretrained("{name}")
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
    parameters, stored = weights_of(model)
    now = sum(parameter.numel() for parameter in parameters)
    # One process writes the card: it cannot count what others hold, or what is not in memory.
    counted = not any(is_sharded(parameter) or parameter.is_meta for parameter in parameters)
    nonzero = f"{sum(int(parameter.count_nonzero()) for parameter in parameters):,}" if counted else ""
    rows = [f"| this model | {now:,} | {nonzero} |"]
    # A class outside transformers may need more than a config. Fewer layers or tokens stand in the config itself.
    if type(model).__module__.startswith("transformers.") and (dense := _dense_parameters(model)) != now:
        rows.insert(0, f"| a dense model of this config | {dense:,} | |")
    table = "\n".join(["| | parameters | not zero |", "|---|---|---|", *rows])
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    packed = len(stored) > len(parameters)
    return f"{table}\n\nWeights are stored as packed integers, {size:,} bytes in all." if packed else table


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


def compression_section(model: PreTrainedModel, has_tokenizer: bool, name: str | None = None) -> str:
    """Describe in Markdown the steps of a model and how to open it; without a record, only the latter.

    Args:
        model: The model.
        has_tokenizer: Whether its tokenizer lies beside it.
        name: Its name on the Hub, if it has one.
    """
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
        return f'{what}\n\n```python\n{imports}\n\nmodel = {auto}.from_pretrained("{name or "path or name"}")\n```\n'
    lines = []
    for number, (method, settings) in enumerate(steps, start=1):
        paper = METHODS[method].paper
        values = {
            key: f"{value:.4g}" if isinstance(value, float) else _SHORT.repr(value) for key, value in settings.items()
        }
        shown = ", ".join(f"`{key}={value}`" for key, value in values.items()) or "the default settings"
        lines.append(f"{number}. **{method}** ([{paper.title}](https://arxiv.org/abs/{paper.identifier})): {shown}")
    place = name or "path or name of this model"
    opening = _OPENING.format(auto=auto, imports=f"{auto}, AutoTokenizer" if has_tokenizer else auto, name=place)
    if has_tokenizer:
        line = f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
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
    places[0].write_text(card_text(model, folder), encoding="utf-8")


def card_text(
    model: PreTrainedModel, folder: str | Path, name: str | None = None, report: Mapping[str, Any] | None = None
) -> str:
    """The whole card of a model: metadata, steps, how to open it, its teacher, what was measured, papers and limits.

    Args:
        model: The saved model.
        folder: Of its files.
        name: Its name on the Hub, if it has one.
        report: The `report.json` that measured it. None: one that lies in the folder, if it does.

    Raises:
        ValueError: If a report that was given did not measure this model.
    """
    title = f"# {type(model).__name__}" + (", compressed with hf_compress" if tags_of(model)[1:] else "")
    if name is not None:
        title = f"# {name.rpartition('/')[2]}"
    data = ModelCardData(library_name="transformers", **_metadata(model))
    trained = training_section(training_of(folder))
    return f"---\n{data.to_yaml()}\n---\n\n{_body(model, folder, title, name, report, trained)}"


def _metadata(model: PreTrainedModel) -> dict[str, Any]:
    """What the Hub reads of a card; what is not known is left out."""
    base, relations = _base_model(model), [METHODS[name].relation for name in tags_of(model)[1:]]
    found: dict[str, Any] = {"base_model": base, "tags": tags_of(model)}
    if base is not None and relations:
        # A model that was only saved in another format has no relation of the Hub's list.
        found["base_model_relation"] = "quantized" if "quantized" in relations else "finetune"
    if (kind := _PIPELINES.get(_auto_class(model))) is not None:
        found["pipeline_tag"] = kind
    return found


def _body(
    model: PreTrainedModel,
    folder: str | Path,
    title: str,
    name: str | None,
    report: Mapping[str, Any] | None,
    trained: str = "",
) -> str:
    own = None
    if report is None and Path(folder, REPORT_FILE).is_file():
        report = read_report(folder)
    if report is not None:
        own = entry_of(report, folder)
    methods = tags_of(model)[1:]
    sections = [
        _MARK,
        title,
        compression_section(model, Path(folder, "tokenizer_config.json").is_file(), name).rstrip(),
        trained,
        measured_section(report, own) if report is not None and own is not None else "",
        limits_section(report, own) if methods else "",
        citation_section([METHODS[name].paper.bibtex for name in methods]),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def add_compression(file: str | Path, model: Any, name: str | None = None) -> None:
    """Add to the card that transformers' Trainer has written what `card_text` says, before the Trainer's text."""
    core = base_of(model)
    if not isinstance(core, PreTrainedModel) or not tags_of(core)[1:]:
        return
    card = ModelCard.load(file)
    found = _metadata(core)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *found.pop("tags")]))
    for key, value in found.items():
        # What the Trainer was told wins.
        if value is not None and card.data.get(key) is None:
            card.data[key] = value
    text = f"{_body(core, Path(file).parent, '', name, None)}\n{card.text.lstrip()}"
    Path(file).write_text(f"---\n{card.data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
