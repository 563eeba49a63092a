"""What a user has in five minutes: a dense model in ONNX Runtime, int8 per channel. `latency.py` times it.

    python benchmarks/onnx_baseline.py --model runs/dense --data_dir DATA/sst2_sentences

prints the accuracy that is left. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.report.latency import unpadded_batches
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.sources import DataArguments, load_task


# What a user has without a guard: the outputs may move by as much as what tells examples apart.
_NO_BOUND = 1.0


def in_onnx_runtime(model: PreTrainedModel, batch: Mapping[str, Tensor], int8: bool = True) -> hc.OnnxModel:
    """A model exported to ONNX Runtime that is called as the original is.

    Args:
        model: A classifier, which is not changed.
        batch: Example inputs; their names become the inputs of the graph.
        int8: Quantise the weights to int8 per channel; activations are quantised as they come.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "exported")
        hc.export_onnx(model, folder, [batch], int8=int8, int8_bound=_NO_BOUND)
        return hc.OnnxModel.from_pretrained(folder, int8)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=128)
    args = parser.parse_args()
    task = load_task(DataArguments(data_dir=args.data_dir, max_length=args.max_length))
    tokenizer, model = open_tokenizer(args.model), open_model(args.model, task).eval()
    rows = task.matched(model.config).encode(args.split, tokenizer, args.max_length)
    small = in_onnx_runtime(model, unpadded_batches(rows, tokenizer, 2, 2)[0])
    right = dict.fromkeys(("PyTorch, float32", "ONNX Runtime, int8"), 0)
    for batch in length_sorted(rows, 32, tokenizer):
        labels = batch.pop("labels")
        batch.pop("index")
        for name, timed in zip(right, (model, small), strict=True):
            right[name] += int((timed(**batch).logits.argmax(-1) == labels).sum())
    for name, count in right.items():
        print(f"{name:20s} {count / len(rows):.4f} of {len(rows)}")


if __name__ == "__main__":
    main()
