"""What a user has in five minutes: a dense model in ONNX Runtime, int8 per channel. `latency.py` times it.

    python benchmarks/onnx_baseline.py --model runs/dense --data_dir DATA/sst2_sentences

prints the accuracy that is left. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compress.report.latency import unpadded_batches
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.sources import DataArguments, load_task


# Single precision must agree to this with PyTorch, or the graph computes something else.
_TOLERANCE = 1e-4


class OnnxModel(nn.Module):
    """A model exported to ONNX Runtime that is called as the original is.

    Args:
        model: A classifier, which is not changed.
        batch: Example inputs; their names become the inputs of the graph.
        int8: Quantise the weights to int8 per channel; activations are quantised as they come.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor], int8: bool = True) -> None:
        super().__init__()
        # Different values under every name: the exporter takes equal tensors for one input.
        inputs = {name: tensor.clone() for name, tensor in batch.items() if name != "labels"}
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            plain, folded, small = (Path(folder, f"{name}.onnx") for name in ("model", "folded", "int8"))
            with torch.inference_mode():
                torch.onnx.export(
                    model.eval(), (), str(plain), dynamo=True, opset_version=18, kwargs=inputs, verbose=False,
                    dynamic_shapes=dict.fromkeys(inputs, sizes), input_names=list(inputs), output_names=["logits"],
                    external_data=False,
                )  # fmt: skip
            self._session = onnxruntime.InferenceSession(str(plain), options)
            difference = (self(**inputs).logits - model(**inputs).logits).abs().max()
            if difference > _TOLERANCE:
                raise ValueError(f"The exported model differs by {difference:.2g} from PyTorch's.")
            if int8:
                # Only weights that stand in the file are quantised, not those that are computed from them.
                quant_pre_process(str(plain), str(folded), skip_symbolic_shape=True)
                quantize_dynamic(str(folded), str(small), weight_type=QuantType.QInt8, per_channel=True)
                self._session = onnxruntime.InferenceSession(str(small), options)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        named = {entry.name for entry in self._session.get_inputs()}
        [logits] = self._session.run(None, {name: given[name].numpy() for name in named})
        return SequenceClassifierOutput(logits=torch.from_numpy(logits))


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
    small = OnnxModel(model, unpadded_batches(rows, tokenizer, 2, 2)[0])
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
