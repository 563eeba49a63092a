"""Follows the models of a recipe without computing them: where each comes from, and which methods it went through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from hf_compress.api import rebuild, steps_of
from hf_compress.core.errors import BROKEN_FILE, first_line
from hf_compress.core.method import Method, MethodConfig, check_order
from hf_compress.export.formats import exported_file
from hf_compress.methods import METHODS
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.measured import folder_of
from hf_compress.stages.models import open_config
from hf_compress.stages.processors import no_folder
from hf_compress.stages.students import BILSTM, named_as_options
from hf_compress.stages.table import Stage


_LAYERS = METHODS["layer_selection"]
# What changes the shapes of a model in a way that only computing it tells.
_RESIZING = ("structured_pruning", "layer_selection")


@dataclass(frozen=True)
class Origin:
    """What is known of a model before it exists.

    Args:
        name: The Hub name or folder at the beginning of its ancestors; None for a new BiLSTM.
        methods: The methods that it will have gone through, in order.
        parameters: How many it has at most.
        working: How many of them every token goes through, which are not those of word embeddings.
        made: Whether a stage of the recipe makes it.
        known_shapes: Whether its layers have the shapes of `skeleton(name)`.
    """

    name: str | None
    methods: tuple[Method, ...] = ()
    parameters: int = 0
    working: int = 0
    made: bool = False
    known_shapes: bool = True


class Models:
    """The models that a recipe begins with, each opened once and without its weights."""

    def __init__(self) -> None:
        self._configs: dict[str, PretrainedConfig] = {}
        self._skeletons: dict[str, PreTrainedModel] = {}

    def config(self, name: str) -> PretrainedConfig:
        """The config of a model that the recipe does not make.

        Raises:
            ValueError: If there is none, or a folder holds no weights.
        """
        if name not in self._configs:
            self._configs[name] = _opened(name)
        return self._configs[name]

    def skeleton(self, name: str) -> PreTrainedModel:
        """The layers of a model without their weights.

        Raises:
            ValueError: If transformers cannot build it, or its record is broken.
        """
        if name not in self._skeletons:
            try:
                with torch.device("meta"):
                    model: PreTrainedModel = AutoModel.from_config(self.config(name))  # type: ignore[no-untyped-call]
            except BROKEN_FILE as error:
                raise ValueError(f"No model can be built from the config at {name!r}: {first_line(error)}") from error
            self._skeletons[name] = rebuild(model)
        return self._skeletons[name]

    def origin(self, name: str) -> Origin:
        """What is known of a model that the recipe does not make.

        Raises:
            ValueError: If it cannot be opened.
        """
        model = self.skeleton(name)
        methods = tuple(METHODS[step["method"]] for step in steps_of(self.config(name)))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        words: Any = getattr(model.get_input_embeddings(), "weight", None)
        return Origin(name, methods, parameters, parameters - (words.numel() if words is not None else 0))

    def commits(self) -> dict[str, str | None]:
        """Name -> the commit that a name on the Hub stands for now; None for a folder."""
        return {name: getattr(config, "_commit_hash", None) for name, config in self._configs.items()}


def _opened(name: str) -> PretrainedConfig:
    try:
        config = open_config(folder_of(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"No model can be opened at {name!r}: {no_folder(name)}{first_line(error)}") from error
    folder = Path(name)
    if exported_file(name) is not None:
        return config
    if folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ValueError(f"No model can be opened at {name!r}: the folder holds a config.json, but no weights.")
    return config


def new_bilstm(arguments: StageArguments, words: int) -> Origin:
    """What is known of a BiLSTM that the recipe makes, which knows so many words."""
    width, size = arguments.option("bilstm_embedding_size"), arguments.option("bilstm_hidden_size")
    # Four gates in two directions, each of its inputs and of the state.
    working = 8 * size * (width + size + (arguments.option("bilstm_layers") - 1) * 3 * size)
    return Origin(None, (), words * width + working, working, made=True, known_shapes=False)


def is_new_bilstm(arguments: StageArguments) -> bool:
    """Whether the student of a stage does not exist yet."""
    return arguments.option("model_name_or_path") == BILSTM and arguments.option("bilstm_layers") is not None


def after(stage: Stage, arguments: StageArguments, origin: Origin, models: Models) -> Origin:
    """What is known of a model after a stage.

    Args:
        stage: The stage.
        arguments: Its arguments.
        origin: The model that it starts from.
        models: Those that the recipe begins with.

    Raises:
        ValueError: If a method of the stage cannot follow those before it, or its config is impossible for the model.
    """
    methods = list(origin.methods)
    known = origin.known_shapes
    for method, config in _applied(stage, arguments):
        # A training goes on with what the model was made for before.
        if method in methods and not method.repeatable and arguments.training_arguments is not None:
            continue
        with named_as_options() if method is _LAYERS else nullcontext():
            check_order(methods, method)
            if config is not None and known and origin.name is not None and method.check is not None:
                _check(method, config, models.skeleton(origin.name), arguments)
        methods.append(method)
        known = known and method.name not in _RESIZING
    known = known and not arguments.option("slim")
    return dataclasses.replace(origin, methods=tuple(methods), made=True, known_shapes=known)


def _applied(stage: Stage, arguments: StageArguments) -> Iterator[tuple[Method, MethodConfig | None]]:
    """The methods that a stage applies, as far as its arguments tell with their configs."""
    layers = arguments.option("student_layers")
    if layers is not None:
        yield _LAYERS, _LAYERS.config_class(num_layers=layers, layers=arguments.option("layers"))  # type: ignore[call-arg]
    if stage.name in METHODS and arguments.option("do_prune") is not False:
        configs = (group for group in arguments.groups().values() if isinstance(group, MethodConfig))
        yield METHODS[stage.name], next(configs, None)


def _check(method: Method, config: Any, model: PreTrainedModel, arguments: StageArguments) -> None:
    """Ask a method whether a config is possible; a budget must be possible at some length of the texts."""
    assert method.check is not None
    lengths: list[int | None] = [None]
    if getattr(config, "seq_len", 0) is None and getattr(config, "mac_ratio", 1) != 1:
        # The least share of the arithmetic rises or falls with the length: the shortest or the longest decides.
        lengths = [arguments.option("longest"), 2]
    for place, length in enumerate(lengths, start=1):
        tried = config if length is None else dataclasses.replace(config, seq_len=length)
        try:
            method.check(model, tried)
            return
        except ValueError:
            if place == len(lengths):
                raise
