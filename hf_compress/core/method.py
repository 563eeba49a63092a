"""The definition of a compression method: its config, its functions, its paper, and its part in training."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.data_needs import Data, DataNeeds
from hf_compress.core.layer_passes import LayerPasses
from hf_compress.core.method_config import MethodConfig as MethodConfig
from hf_compress.core.method_training import MethodTraining


@dataclasses.dataclass(frozen=True)
class Paper:
    """The publication of a method; model cards cite it."""

    title: str
    identifier: str
    bibtex: str


class ModelPart(enum.Enum):
    """A part of a dense model that a method may need or replace; the value names it in messages."""

    ATTENTION = "softmax attention"
    LAYER_FORWARD = "ordinary layers"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to change a model. `compress` may read weights and data; `rebuild` may not.

    Args:
        name: The name of its folder, in `config.json` and on the command line.
        config_class: The method's `MethodConfig`.
        compress: `(model, config, data) -> completed config`; changes a live model in place. The completed config
            holds the resulting sizes, so that `rebuild` needs nothing else. The caller records it, and writes its flat
            fields into the model's config.
        rebuild: `(model, completed config) -> None`; gives a dense skeleton (possibly on the meta device) the same
            module tree. `compress(model).state_dict()` must load strictly into it.
        paper: Where it was published.
        check: `(model, config) -> None`; raises `ValueError` when the config is impossible for the model, before
            anything is changed. None: every config is possible for every model.
        plain: `(model, completed config) -> dict`; the config fields with which stock transformers builds the same
            modules, or `ValueError` that says which layer prevents it. None: never expressible.
        make_plain: `(model) -> None`; called by `to_plain` once every step has a plain form: makes the modules of the
            method those of stock transformers. None: they are already.
        data_needs: `(config) -> DataNeeds`; how `compress` reads its data. None: not at all.
        repeatable: Whether a model may go through it more than once.
        relation: What the Hub calls a model that went through it, beside its base model (`base_model_relation`).
        first: Whether it must be the first step of a model.
        last: Whether no other step may follow, because weights cannot be changed any more.
        needs: Parts of a dense model that must still be there.
        replaces: Parts of a dense model that it replaces; no method that needs one of them may follow.
        renumbers_inputs: Whether inputs that were prepared for the model before mean something else to it afterwards.
        implied: `(model config) -> config or None`; the method config that flat fields written by hand ask for, for
            models that have no such step yet.
        check_loaded: `(model) -> None`; called after a saved model was opened, to warn if its weights contradict the
            record, or to compute what is not saved. None: nothing to do.
        training: `(model) -> MethodTraining`; what the method does in a training of a model that went through it.
            None: nothing.
        compress_layers: `(passes, config) -> completed config`; what `compress` does to a model whose layers are
            in memory one at a time. It may be called again after it was killed, and then ends with the same. Raises
            `ValueError` where a config needs the whole model. None: the method always does.
    """

    # The callables take a config of `config_class`, which these types cannot express.
    name: str
    config_class: type[MethodConfig]
    compress: Callable[[PreTrainedModel, Any, Data | None], MethodConfig]
    rebuild: Callable[[PreTrainedModel, Any], None]
    paper: Paper
    check: Callable[[PreTrainedModel, Any], None] | None = None
    plain: Callable[[PreTrainedModel, Any], dict[str, Any]] | None = None
    make_plain: Callable[[PreTrainedModel], None] | None = None
    data_needs: Callable[[Any], DataNeeds] | None = None
    relation: Literal["finetune", "quantized"] = "finetune"
    repeatable: bool = True
    first: bool = False
    last: bool = False
    needs: frozenset[ModelPart] = frozenset()
    replaces: frozenset[ModelPart] = frozenset()
    renumbers_inputs: bool = False
    implied: Callable[[PretrainedConfig], MethodConfig | None] | None = None
    check_loaded: Callable[[PreTrainedModel], None] | None = None
    training: Callable[[PreTrainedModel], MethodTraining] | None = None
    compress_layers: Callable[[LayerPasses, Any], MethodConfig] | None = None

    def needs_of(self, config: MethodConfig) -> DataNeeds:
        """How `compress` reads its data under a config."""
        return DataNeeds() if self.data_needs is None else self.data_needs(config)

    def defines(self, module: nn.Module) -> bool:
        """Whether the class of a module comes from the package of this method."""
        home = self.config_class.__module__
        package = home.rpartition(".")[0] or home
        return f"{type(module).__module__}.".startswith(f"{package}.")


def check_order(earlier: Sequence[Method], method: Method) -> None:
    """Refuse a method that cannot follow those that were applied to a model.

    Args:
        earlier: The methods of the model's steps, in order.
        method: The method to apply next.

    Raises:
        ValueError: If it may not be repeated, must come first, comes after one that must be last, or needs a part of
            the model that was replaced.
    """
    for before in earlier:
        if before is method and not method.repeatable:
            raise ValueError(f"Steps must not repeat {method.name}: a model goes through it once.")
        if before.last:
            raise ValueError(
                f"{method.name} cannot follow {before.name}: its weights are packed and cannot be changed. Apply "
                f"{method.name} before it, or turn them into ordinary weights first (hc.dequantize(model))."
            )
        if method.first:
            raise ValueError(
                f"{method.name} cannot follow {before.name}: it must be the first step of a model. Apply it to the "
                "dense model."
            )
        for part in sorted(method.needs & before.replaces, key=lambda part: part.value):
            raise ValueError(
                f"{method.name} cannot follow {before.name}: it needs {part.value}, which {before.name} has replaced."
            )
