"""The record: the steps that made a model, kept in `config.json` under `quantization_config`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.core.method_config import MethodConfig


if TYPE_CHECKING:
    # The loader imports this file while transformers may be in the middle of importing its configs.
    from transformers import PretrainedConfig


QUANT_METHOD = "hf_compress"
RECORD_VERSION = 1


@dataclass
class CompressionConfig(QuantizationConfigMixin):
    """The list of compression steps of a model, in the order in which they were applied.

    transformers calls this field "quantization_config". It is the only public hook by which a package can reshape a
    model in plain `from_pretrained` before its weights are read.

    Args:
        version: Format of the record. A record of a newer release is refused, not partly read.
        steps: One dict for each step: `{"method": <folder name>, ...}`.

    Example:
        >>> CompressionConfig(steps=[{"method": "structured_pruning"}]).to_dict()["version"]
        1
    """

    # transformers has an enum of its own methods here, and takes any string.
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # an enum there
    version: int = RECORD_VERSION
    steps: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "version": self.version, "steps": copy.deepcopy(self.steps)}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_record(config_dict)
        return super().from_dict(config_dict, *args, **kwargs)  # type: ignore[no-untyped-call]  # of transformers


def check_record(record: Any) -> None:
    """Refuse a record that belongs to another package or that this version cannot read.

    Raises:
        ValueError: Names the problem and, for a newer version, the remedy.
    """
    if not isinstance(record, dict):
        raise ValueError(f"quantization_config must be a dict in config.json, got {record!r}.")
    if record.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"quantization_config must be empty or of hf_compress, got quant_method={record.get('quant_method')!r}: "
            "a model holds one such record. Compress the unquantised model."
        )
    version = record.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= RECORD_VERSION:
        raise ValueError(
            f"The record has version {version!r}, this hf_compress reads up to {RECORD_VERSION}. "
            "Upgrade with: pip install -U hf_compress"
        )
    unknown = record.keys() - {entry.name for entry in fields(CompressionConfig)}
    if unknown:
        raise ValueError(
            f"The record must hold quant_method, version and steps, got {', '.join(sorted(map(repr, unknown)))} in it."
        )
    if not isinstance(record.get("steps"), list):
        raise ValueError(f"The record must hold a list of steps, got {record.get('steps')!r}.")


def record_of(config: PretrainedConfig) -> dict[str, Any]:
    """Read the record in a model's config; it is empty if the config has none.

    Raises:
        ValueError: If it belongs to another package or a newer version.
    """
    found: Any = getattr(config, "quantization_config", None)
    record: dict[str, Any] | None = found.to_dict() if hasattr(found, "to_dict") else found
    if record is None:
        return CompressionConfig().to_dict()
    check_record(record)
    return record


def quantized_by_another(config: PretrainedConfig) -> bool:
    """Whether the model was quantised by another package, so that its config cannot hold our record."""
    found = getattr(config, "quantization_config", None)
    kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return found is not None and kind != QUANT_METHOD


def write_flat_fields(config: PretrainedConfig, completed: MethodConfig) -> None:
    """Write the flat fields of a finished step, which are no part of the record, into a model's config."""
    for name in completed.flat:
        setattr(config, name, getattr(completed, name))


def append_step(
    config: PretrainedConfig, method: str, completed: MethodConfig, *, instead_of: int | None = None
) -> None:
    """Write a finished step into a model's config.

    Args:
        config: Config of the model that the step was applied to.
        method: The name of the method.
        completed: The method's config, with the resulting sizes.
        instead_of: Index of the entry to replace, if the step continues an earlier one. None: append a new entry.
    """
    steps = record_of(config)["steps"]
    write_flat_fields(config, completed)
    step = {"method": method, **completed.to_record()}
    if instead_of is None:
        steps.append(step)
    else:
        steps[instead_of] = step
    replace_steps(config, steps)


def replace_steps(config: PretrainedConfig, steps: list[dict[str, Any]]) -> None:
    """Give a model's config other steps; without any it has no record."""
    if steps:
        config.quantization_config = CompressionConfig(steps=steps)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
