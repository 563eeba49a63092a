"""Which model and method export to ONNX Runtime: `python -m tests.export_support [ARCHITECTURE ...]` tries and prints.

Each cell is a tiny model that was exported and compared with PyTorch, or the words of its refusal.
"""

import copy
import logging
import sys
import tempfile
import warnings

import torch

import hf_compress as hc
from tests.conftest import ARCHITECTURES, HEADS, _batches
from tests.contract.conftest import METHOD_CONFIGS, REFUSED


# Decoders and models of sounds are exported with the head that they are used with; all others without one.
HEAD = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "opt"), "causal_lm")
HEAD |= dict.fromkeys(("wav2vec2", "wav2vec2-stable"), "ctc")
DENSE = "dense"
METHODS = (DENSE, *METHOD_CONFIGS)


def tiny(architecture):
    torch.manual_seed(0)
    return HEADS[HEAD.get(architecture, "base")].from_config(ARCHITECTURES[architecture]()).eval()


def verdict(architecture, method, dense):
    """`yes` after ONNX Runtime gave PyTorch's outputs on batches of several sizes, or the reason why not."""
    if (method, architecture) in REFUSED:
        return "no such model"
    model = copy.deepcopy(dense)
    if method != DENSE:
        model = hc.compress(model, METHOD_CONFIGS[method](), data=_batches(model.config))
    checked = [_batches(model.config, count=1, size=size, length=length)[0] for size, length in ((4, 12), (2, 20))]
    with tempfile.TemporaryDirectory() as place:
        try:
            report = hc.export_onnx(model, f"{place}/model", checked)
        except ValueError as error:
            return str(error)
    return f"yes ({report['largest_difference']:.0e})"


def main(architectures):
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for architecture in architectures or ARCHITECTURES:
        dense = tiny(architecture)
        print(architecture, {method: verdict(architecture, method, dense) for method in METHODS}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
