"""How token vectors become a sentence vector, and the files in which sentence-transformers writes that down.

Letters: B batch, S padded length, D dimensions.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from hf_compress.core.errors import first_line


_MODULES = "modules.json"
# Names of all releases: later ones read those of the first.
_TYPES = "sentence_transformers.models"
_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")


class Pooling(enum.Enum):
    """How the vectors of a sentence's tokens become one."""

    MEAN = "mean"
    CLS = "cls"
    MAX = "max"
    LAST = "lasttoken"

    def pooled(self, states: Tensor, live: Tensor) -> Tensor:
        """One vector for each sentence.

        Args:
            states: [B, S, D].
            live: [B, S] bool, False for padding.

        Returns:
            [B, D].
        """
        count = torch.arange(len(states), device=states.device)
        if self is Pooling.MEAN:
            weights = live.unsqueeze(-1).to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        if self is Pooling.MAX:
            return states.masked_fill(~live.unsqueeze(-1), -torch.inf).amax(1)
        if self is Pooling.CLS:
            return states[count, live.int().argmax(1)]
        last = live.shape[1] - 1 - live.flip(1).int().argmax(1)
        return states[count, last]


def _read(source: str, file: str) -> bytes | None:
    """A file of a folder or of a model on the hub; None where there is no such file."""
    if Path(source).is_dir():
        path = Path(source, file)
        return path.read_bytes() if path.is_file() else None
    found = cached_file(
        source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found).read_bytes() if found is not None else None


def _json(source: str, file: str) -> Any:
    content = _read(source, file)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} at {source!r} is no JSON: {first_line(error)}") from error


def _modules(source: str) -> list[dict[str, str]]:
    """What a sentence encoder does one after the other: type and folder of each part."""
    modules = _json(source, _MODULES) or []
    if not isinstance(modules, list) or not all(isinstance(part, dict) and "type" in part for part in modules):
        raise ValueError(f"{_MODULES} at {source!r} must be a list of objects with type and path.")
    for part in modules:
        path = PurePosixPath(str(part.get("path", "")))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{_MODULES} at {source!r} names the path {str(path)!r} outside of the model's folder.")
    return modules


def has_pooling(config: PretrainedConfig) -> bool:
    """Whether a config was read beside files that make its model a sentence encoder."""
    source = getattr(config, "_name_or_path", "")
    return bool(source) and _read(source, _MODULES) is not None


def pooling_of(config: PretrainedConfig) -> Pooling:
    """How a model pools; the mean where its folder does not say.

    Raises:
        ValueError: If the folder asks for more than one pooling or for layers above it.
    """
    source = getattr(config, "_name_or_path", "")
    found = Pooling.MEAN
    for part in _modules(source) if source else []:
        name = part["type"].rpartition(".")[2]
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(f"its vectors go through {name} ({part['type']}) after pooling, which is not supported.")
        if name == "Pooling":
            found = _named(_json(source, str(PurePosixPath(part.get("path", ""), "config.json"))) or {})
    return found


def _named(settings: dict[str, Any]) -> Pooling:
    prefix = "pooling_mode_"
    chosen = settings.get("pooling_mode")
    if chosen is None:
        chosen = [name.removeprefix(prefix) for name, on in settings.items() if name.startswith(prefix) and on is True]
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    known = {alias: pooling for pooling in Pooling for alias in (pooling.value, f"{pooling.value}_tokens")}
    known["cls_token"] = Pooling.CLS
    if len(names) != 1 or names[0] not in known:
        raise ValueError(
            f"it pools by {', '.join(names) or 'nothing'}; one of {', '.join(p.value for p in Pooling)} is supported."
        )
    return known[names[0]]


def sentence_files(source: str) -> dict[str, bytes]:
    """The files that make a model's folder one that `SentenceTransformer` opens.

    Args:
        source: Folder or hub name of the model that was compressed. Its own files are kept; for a plain encoder they
            say: the mean of the token vectors, scaled to length 1.

    Returns:
        Path in the folder -> content.
    """
    parts = _modules(source)
    if not parts:
        return _mean_pooling(AutoConfig.from_pretrained(source))
    files = {file: _read(source, file) for file in (_MODULES, *_SETTINGS)}
    for part in parts:
        path = part.get("path", "")
        if path:
            for file in ("config.json", "model.safetensors"):
                files[str(PurePosixPath(path, file))] = _read(source, str(PurePosixPath(path, file)))
    return {file: content for file, content in files.items() if content is not None}


def own_sentence_files(source: str) -> dict[str, bytes]:
    """As `sentence_files`; empty where the source is no sentence encoder."""
    return sentence_files(source) if _modules(source) else {}


def _mean_pooling(config: PretrainedConfig) -> dict[str, bytes]:
    names = ("Transformer", "Pooling", "Normalize")
    folders = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"{_TYPES}.{name}"}
        for i, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    contents: dict[str, Any] = {_MODULES: modules, "1_Pooling/config.json": pooling}
    return {file: json.dumps(content, indent=2).encode() for file, content in contents.items()}
