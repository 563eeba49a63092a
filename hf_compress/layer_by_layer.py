"""Compresses a saved model that does not fit into memory: its layers are loaded, changed and written one at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_compress
from hf_compress.api import method_of, rebuild, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.batches import accepted_arguments
from hf_compress.core.data_needs import Data, readable_data, require_batches
from hf_compress.core.devices import chosen_device
from hf_compress.core.layer_passes import LayerPasses
from hf_compress.core.layer_store import LayerStore
from hf_compress.core.method import Method, MethodConfig, check_order
from hf_compress.core.processes import several_processes
from hf_compress.core.record import append_step
from hf_compress.core.saved_weights import INDEX, WEIGHTS, SavedWeights
from hf_compress.core.saving import complete_or_absent, require_own_folder, sole_training, write_json
from hf_compress.core.skeletons import empty_model, load_outside_
from hf_compress.core.unfinished import Unfinished
from hf_compress.folder_card import write_card
from hf_compress.methods import METHODS


logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-layers"
# Files beside the weights that say how texts become inputs.
_PROCESSOR = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.model|"
    r"spiece\..*|chat_template\.(json|jinja)|(pre)?processor_config\.json"
)

# Writes further files beside a finished model, which is on the meta device but for what lies outside its layers.
Beside = Callable[[PreTrainedModel, Path], None]


def compress_folder(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *configs: MethodConfig,
    data: Data | None = None,
    device: str | None = None,
) -> Path:
    """Compress a saved model layer by layer, so that never more than one of its layers is loaded.

    The result is what `compress` makes of the opened model, to rounding: a folder that plain `from_pretrained` opens.
    In memory are one layer (two where a method compares with the dense model), what the method computes of it, the
    hidden states of the calibration data and the embeddings. A run that was killed goes on at the layer that it had
    reached when it is called again with the same arguments, and ends in the same files.

    Args:
        source: Folder of a model with safetensors, in one file or in shards.
        output_dir: Folder of the result. Until it is complete, the parts are in a folder `.unfinished-layers` in it.
        configs: One for each step, in the order in which they are applied. The methods must be able to work layer by
            layer, structured pruning with `order="sequential"`.
        data: Calibration batches, as `compress` takes them; they are held in memory.
        device: Where layers are computed, such as `cuda`. None: the accelerator if there is one, else the CPU.

    Returns:
        The folder of the result.

    Raises:
        ValueError: If the folder holds no whole model, weights are not finite, a method cannot work layer by layer or
            not with this model, data are missing, or `output_dir` holds unfinished work of other inputs.

    Example:
        >>> import hf_compress as hc                                                            # doctest: +SKIP
        >>> pruning = hc.StructuredPruningConfig(mac_ratio=0.7, order="sequential")             # doctest: +SKIP
        >>> hc.compress_folder("large-model", "large-model-0.7", pruning, data=batches)         # doctest: +SKIP
    """
    return compress_saved(
        source, output_dir, configs, data, device, lambda model, staged: write_card(staged, model, Path(output_dir))
    )


def compress_saved(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    configs: Sequence[MethodConfig],
    data: Data | None,
    device: str | None,
    beside: Beside | None = None,
) -> Path:
    """Do what `compress_folder` does, with further files in the result."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source must be the folder of a saved model, got a {type(source).__name__}: use compress.")
    if not configs:
        raise ValueError("configs must name at least one step, got none.")
    methods = [method_of(config) for config in configs]
    for method in methods:
        if method.compress_layers is None:
            raise ValueError(f"{method.name} cannot work layer by layer: open the model whole, and use compress.")
    if several_processes():
        raise ValueError("Layers are compressed one by one in one process, got several: start it without a launcher.")
    require_own_folder(output_dir, {"source": source})
    start, target, place = Path(source), Path(output_dir), chosen_device(device or "auto")
    weights = SavedWeights(start)
    model = empty_model(start, weights, rebuild)
    _check(model, list(zip(methods, configs, strict=True)))
    batches = _held(model, methods, configs, data)
    inputs = {
        "source": [weights.identity(), _digest_of((start / "config.json").read_bytes())],
        "configs": [[method.name, config.to_record()] for method, config in zip(methods, configs, strict=True)],
        "data": _digest(model, batches),
        "device": str(place),
        "versions": [hf_compress.__version__, transformers.__version__, torch.__version__],
    }
    with sole_training(target):
        unfinished = Unfinished(target / UNFINISHED, inputs)
        try:
            _apply(start, target, list(zip(methods, configs, strict=True)), batches, place, unfinished, beside)
        except ValueError:
            # Settings or data were refused before a layer was written: other ones must find an empty folder.
            if not any(unfinished.folder.rglob("*.safetensors")):
                unfinished.forget()
            raise
        unfinished.forget()
    return target


def _apply(
    start: Path,
    target: Path,
    steps: Sequence[tuple[Method, MethodConfig]],
    batches: Sequence[Mapping[str, Any]] | None,
    place: torch.device,
    unfinished: Unfinished,
    beside: Beside | None,
) -> None:
    """Go through the steps that are not done yet; the result of the last one is the target."""
    last = len(steps) - 1
    for position, (method, config) in enumerate(steps):
        ended = target if position == last else unfinished.folder / f"model-{position}"
        if unfinished.noted(f"step-{position}") is None or not (ended / INDEX).is_file():
            step = _Step(start, ended, Unfinished(unfinished.folder / f"layers-{position}", {}), place)
            step.apply(method, config, batches, beside if position == last else None)
            unfinished.note(f"step-{position}", "done")
            step.unfinished.forget()
        start = ended


def _check(model: PreTrainedModel, steps: Sequence[tuple[Method, MethodConfig]]) -> None:
    """Refuse what can be refused before any work; later steps are checked again, in their turn."""
    earlier = [METHODS[step["method"]] for step in steps_of(model)]
    for method, config in steps:
        check_order(earlier, method)
        if method.check is not None:
            method.check(model, config)
        earlier.append(method)


def _held(
    model: PreTrainedModel, methods: Sequence[Method], configs: Sequence[MethodConfig], data: Data | None
) -> list[Mapping[str, Any]] | None:
    """The calibration data as batches of tensors, read once; None if no method reads any."""
    needs = [method.needs_of(config) for method, config in zip(methods, configs, strict=True)]
    reading = [need for need in needs if need.passes]
    if not reading:
        return None
    found = list(readable_data(model, data, 1, reading[0].setting))
    require_batches(len(found))
    return found


def _digest(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]] | None) -> str:
    """Compute a digest of what a model reads of its data."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches or ():
        # A batch that is none is refused where it is read.
        inputs = accepted_arguments(model.base_model, batch) if isinstance(batch, Mapping) else {}
        for name, value in sorted(inputs.items()):
            if torch.is_tensor(value):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Step:
    """One method on a saved model.

    Args:
        source: Folder of the model.
        target: Folder of the result.
        unfinished: Remembers how far it got.
        device: Where layers are computed.
    """

    def __init__(self, source: Path, target: Path, unfinished: Unfinished, device: torch.device) -> None:
        self._source, self._target, self.unfinished, self._device = source, target, unfinished, device

    def apply(self, method: Method, config: MethodConfig, batches: Data | None, beside: Beside | None) -> None:
        """Compress and save the model."""
        weights = SavedWeights(self._source)
        model = empty_model(self._source, weights, rebuild)
        _check(model, [(method, config)])
        layers = layers_of(model)
        store = LayerStore(model, [layer.module for layer in layers], weights, self.unfinished.folder, self._device)
        load_outside_(model, weights, store.holds, self._device)
        assert method.compress_layers is not None
        reads = method.needs_of(config).passes > 0
        passes = LayerPasses(model, layers, batches if reads else None, store, self.unfinished)
        append_step(model.config, method.name, method.compress_layers(passes, config))
        with complete_or_absent(self._target) as staged:
            _save_outside(model, store, staged)
            _join(staged, store)
            for file in sorted(self._source.iterdir()):
                if file.is_file() and _PROCESSOR.fullmatch(file.name):
                    shutil.copyfile(file, staged / file.name)
            if beside is not None:
                beside(model, staged)


def _save_outside(model: PreTrainedModel, store: LayerStore, staged: Path) -> None:
    """Save the config and the weights outside the layers, as transformers names them."""
    outside = {name: tensor for name, tensor in model.state_dict().items() if not store.holds(name)}
    # One file: only the layers are apart.
    model.save_pretrained(staged, state_dict=outside, max_shard_size=2**62)


def _join(staged: Path, store: LayerStore) -> None:
    """Put the files of the layers beside that of the other weights, and write the index of all."""
    files = [staged / WEIGHTS, *(store.file(index) for index in range(len(store)))]
    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if file.parent == staged:
            file.rename(staged / name)
        else:
            _link(file, staged / name)
        for tensor, bytes_each in _header(staged / name):
            weight_map[tensor], size = name, size + bytes_each
    write_json(staged / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _header(file: Path) -> list[tuple[str, int]]:
    """Name and number of bytes of each tensor in a file of safetensors."""
    with file.open("rb") as stream:
        content: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    offsets = ((name, entry["data_offsets"]) for name, entry in content.items() if name != "__metadata__")
    return [(name, end - start) for name, (start, end) in offsets]


def _link(file: Path, place: Path) -> None:
    """Give a file a second name, so that it is still there if the program ends now; where that fails, copy it."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
