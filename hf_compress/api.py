"""The verbs: compress a model and record the steps, rebuild shapes from a record, read a record, drop it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.data_needs import Data, checked_data
from hf_compress.core.method import Method, MethodConfig, check_order
from hf_compress.core.method_training import MethodTraining
from hf_compress.core.own_config import own_config_
from hf_compress.core.processes import first_told, make_equal_, require_same_model, together
from hf_compress.core.record import append_step, quantized_by_another, record_of, replace_steps, write_flat_fields
from hf_compress.core.rollback import restored_on_failure
from hf_compress.methods import METHODS


logger = logging.getLogger(__name__)


def _parse(step: Mapping[str, Any], config: PretrainedConfig, position: int) -> tuple[Method, MethodConfig]:
    """Read one step of the record as its method and config; a broken step raises one `ValueError`."""
    name = step.get("method") if isinstance(step, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"Step {position}: method must be one of {', '.join(METHODS)}, got {name!r}.")
    method = METHODS[name]
    values = {key: value for key, value in step.items() if key != "method" and key not in method.config_class.retired}
    for key in method.config_class.flat:
        if hasattr(config, key):
            values[key] = getattr(config, key)
    try:
        return method, method.config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Step {position} ({name}) is broken: {error}") from error


def _parsed(config: PretrainedConfig) -> list[tuple[Method, MethodConfig]]:
    """Read the steps of a model's record, and check that each of them may follow those before it."""
    parsed: list[tuple[Method, MethodConfig]] = []
    for position, step in enumerate(record_of(config)["steps"]):
        method, completed = _parse(step, config, position)
        try:
            check_order([earlier for earlier, _ in parsed], method)
        except ValueError as error:
            raise ValueError(f"Step {position} ({method.name}) is broken: {error}") from error
        parsed.append((method, completed))
    return parsed


def steps_of(model_or_config: PreTrainedModel | PretrainedConfig) -> list[dict[str, Any]]:
    """List the steps that made a model, first to last; an uncompressed model has none.

    Raises:
        ValueError: If the record belongs to another package or a newer version, names an unknown method or holds an
            impossible value.

    Example:
        >>> from transformers import BertConfig
        >>> steps_of(BertConfig())
        []
    """
    config = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    flat = [{key: getattr(done, key) for key in method.config_class.flat} for method, done in _parsed(config)]
    return [{**step, **knobs} for step, knobs in zip(record_of(config)["steps"], flat, strict=True)]


def check_finite(model: PreTrainedModel) -> None:
    """Raise `ValueError` if a weight is NaN or infinite, because everything computed from it would be too."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"Weights must be loaded, but {name} is on the meta device. rebuild() needs shapes only.")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"Weights must be finite, got NaN or infinity in {name}.")


def method_of(config: MethodConfig) -> Method:
    """Find the method that a config belongs to."""
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = ", ".join(method.config_class.__name__ for method in METHODS.values())
    raise ValueError(f"configs must be one of {known}, got {type(config).__name__}.")


def compress(model: PreTrainedModel, *configs: MethodConfig, data: Data | None = None) -> PreTrainedModel:
    """Change a model in place, one step for each config, and record the steps in its config.

    Args:
        model: A dense or already compressed transformers model with ordinary weights.
        configs: One for each step, in the order in which they are applied.
        data: Calibration batches: dicts of tensors as the model takes them, or a `DataLoader` of such; rows of a
            tokenized `datasets.Dataset` or lists of ids are padded into batches of eight. An iterator is enough for a
            single pass; a list, a data set or a `DataLoader` can be read as often as needed.

            Where `torch.distributed` runs several processes, all of them call this function with the same model,
            configs and data: each reads its share of the batches (batch i is read by process i modulo their number;
            loaders from `accelerator.prepare` or with a `DistributedSampler` are shares already), and all end with the
            same model, equal to that of one process to rounding.

    Returns:
        The same model. If anything fails on the way, Ctrl-C included, the model is as it was before, down to the
        parameter objects. The memory of what the steps replace is freed when all of them are done.

    Raises:
        ValueError: Before the model is changed, if a config is impossible for it or cannot follow the steps before,
            if data are missing, cannot be read often enough or have no labels, or if a weight is not finite. If one of
            several processes fails, all of them do.

    Example:
        >>> import hf_compress as hc
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> batches = [{"input_ids": torch.randint(0, 99, (8, 16))}]
        >>> model = hc.compress(BertModel(tiny), hc.StructuredPruningConfig(mac_ratio=0.7), data=batches)
        >>> hc.steps_of(model)[0]["mac_ratio"]
        0.7
    """
    if not isinstance(model, PreTrainedModel):
        hint = " Merge its adapters first (merge_and_unload)." if hasattr(model, "peft_config") else ""
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.{hint}")
    if not configs:
        raise ValueError("configs must name at least one step, got none.")
    steps = [(method_of(config), config) for config in configs]
    needs = [method.needs_of(config) for method, config in steps]
    reading = [need.adds_up for need in needs if need.passes]
    with together(model, bool(reading) and all(reading)):
        earlier = [method for method, _ in _parsed(model.config)]
        check_finite(model)
        for method, config in steps:
            check_order(earlier, method)
            _check(method, model, config)
            earlier.append(method)
        _check_inputs(steps)
        require_same_model(model, *configs)
        _apply(model, steps, checked_data(model, data, needs))
    return model


def _check_inputs(steps: Sequence[tuple[Method, MethodConfig]]) -> None:
    """Raise `ValueError` if a method would read data that an earlier one of the same call makes meaningless."""
    renumbering = ""
    for method, config in steps:
        if renumbering and method.needs_of(config).passes:
            raise ValueError(
                f"{method.name} must come before {renumbering}, or in a call of its own: the ids in data mean other "
                f"tokens after {renumbering}."
            )
        renumbering = method.name if method.renumbers_inputs else renumbering


def _apply(model: PreTrainedModel, steps: Sequence[tuple[Method, MethodConfig]], batches: Data | None) -> None:
    with restored_on_failure(model):
        own_config_(model)
        for position, (method, config) in enumerate(steps):
            if position:
                # Checked once more, because the earlier steps have changed the model.
                _check(method, model, config)
            completed = first_told(method.compress(model, config, batches))
            assert completed is not None
            append_step(model.config, method.name, completed)
        make_equal_(model)


def _check(method: Method, model: PreTrainedModel, config: MethodConfig) -> None:
    if method.check is not None:
        method.check(model, config)


def apply_implied(model: PreTrainedModel) -> PreTrainedModel:
    """Apply the methods that flat fields of the config ask for, as published workflows write them by hand.

    Returns:
        The same model, on the device it was on.

    Raises:
        ValueError: If such a field has an impossible value, or the model cannot go through the method.
    """
    foreign = quantized_by_another(model.config)
    done = [] if foreign else [step["method"] for step in steps_of(model)]
    for method in METHODS.values():
        wanted = method.implied(model.config) if method.implied and method.name not in done else None
        if wanted is not None:
            logger.info("The model's config asks for %s: applied.", method.name)
            device = model.device
            compress(model, wanted).to(device)  # type: ignore[arg-type]  # Its wrapper hides the signature.
    return model


def rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """Give a freshly built model the module tree of the record in its config.

    `AutoModel.from_config` ignores the record; this function applies it. Where shapes change, the weights of the
    skeleton become meaningless.

    Returns:
        The same model.

    Raises:
        ValueError: If the record is broken.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> skeleton = rebuild(BertModel(BertConfig(num_hidden_layers=1)))   # nothing recorded, nothing to do
    """
    for method, completed in _parsed(model.config):
        method.rebuild(model, completed)
        write_flat_fields(model.config, completed)
    return model


def trainings_of(model: PreTrainedModel) -> dict[str, MethodTraining]:
    """Give what each method of the record does when the model is trained, by method name, in the record's order."""
    methods = [METHODS[name] for name in dict.fromkeys(step["method"] for step in steps_of(model))]
    return {method.name: method.training(model) for method in methods if method.training is not None}


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Turn packed weights into the numbers they stand for; every other step of a model stays.

    The result can be trained, changed, compressed further and saved again, at the size of ordinary weights.

    Returns:
        The same model, without the step `weight_quantization` in its record.

    Raises:
        ValueError: If no weights are packed.

    Example:
        >>> import hf_compress as hc
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> packed = hc.compress(BertModel(tiny), hc.WeightQuantizationConfig(bits=4, algorithm="rtn"))
        >>> hc.steps_of(dequantize(packed))
        []
    """
    steps = steps_of(model)
    # Nothing may follow packed weights.
    last = METHODS[steps[-1]["method"]] if steps else None
    if last is None or last.make_plain is None:
        raise ValueError("The model must have packed weights to be dequantised, got none.")
    last.make_plain(model)
    replace_steps(model.config, steps[:-1])
    return model


def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Drop the record of a model that stock transformers can build from ordinary config fields.

    Returns:
        The same model, packed weights turned into the numbers they stand for. What `save_pretrained` writes of it
        opens without this package.

    Raises:
        ValueError: If a step cannot be expressed by such fields; names the layer that prevents it. The model is then
            unchanged.
    """
    fields: dict[str, Any] = {}
    parsed = _parsed(model.config)
    for position, (method, completed) in enumerate(parsed):
        if method.plain is None:
            raise ValueError(f"Step {position} ({method.name}) has no form that stock transformers can build.")
        fields.update(method.plain(model, completed))
    for name, value in fields.items():
        setattr(model.config, name, value)
    for method, _ in reversed(parsed):
        if method.make_plain is not None:
            method.make_plain(model)
    replace_steps(model.config, [])
    return model
