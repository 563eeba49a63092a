"""Says which modules of a model are quantised, and which of them read the same input."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.expressions import matches
from hf_compress.core.projections import NEURON_ROLES, Role, module_inputs, module_outputs
from hf_compress.methods.weight_quantization.config import WeightQuantizationConfig


# Roles whose modules read the same tensor.
_SHARING = ((Role.QUERY, Role.KEY, Role.VALUE), NEURON_ROLES)


def chosen_modules(
    layer: TransformerLayer, config: WeightQuantizationConfig, prefix: str
) -> dict[str, nn.Linear | Conv1D]:
    """Path in the layer -> module, for the projections of a layer that a config selects.

    Names are the same whether or not a task head is on top, because a record rebuilds both: expressions may match with
    or without the name of the base model. Modules without inputs or outputs have no weight to store.

    Args:
        layer: The layer.
        config: Which modules to take.
        prefix: What the base model is called inside a model with a head.
    """
    place = f"{layer.architecture.layers}.{layer.index}"

    def matched(path: str, expressions: tuple[str, ...]) -> bool:
        return any(matches(name, expressions) for name in (f"{place}.{path}", f"{prefix}.{place}.{path}"))

    return {
        path: module
        for path, module in layer.modules.items()
        if (config.op_names is None or matched(path, config.op_names))
        and not matched(path, config.excluded_op_names or ())
        and module_inputs(module) * module_outputs(module)
    }


def layers_to_quantise(model: PreTrainedModel, config: WeightQuantizationConfig) -> list[TransformerLayer]:
    """The layers of a model, at least one of which has modules that a config selects.

    Raises:
        ValueError: If the architecture is not supported, or no module is selected.
    """
    layers = layers_of(model)
    if not any(chosen_modules(layer, config, model.base_model_prefix) for layer in layers):
        names = ", ".join(layers[0].modules)
        raise ValueError(
            f"op_names={_listed(config.op_names)} and excluded_op_names={_listed(config.excluded_op_names)} must "
            f"select a projection of a layer, and select none. Layers have: {names}."
        )
    return layers


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def shared_inputs(layer: TransformerLayer, paths: list[str]) -> list[list[str]]:
    """Group modules of a layer by the input that they read, in the order in which they run.

    Modules that also read embeddings of positions are alone. Keys and values of linear attention are projected after
    they were pooled, so the inputs of the query, of which those rows are sums, stand for theirs, too.
    """
    found: dict[object, list[str]] = {}
    for path in paths:
        role = layer.architecture.projections[path][0]
        key = next((roles for roles in _SHARING if role in roles and not reads_positions(layer)), path)
        found.setdefault(key, []).append(path)
    return list(found.values())


def reads_positions(layer: TransformerLayer) -> bool:
    """Whether modules of a layer run more than once, because they also project embeddings of positions."""
    return layer.architecture.position_work is not None
