"""Which model and method export to ONNX Runtime: `python -m tests.export_support [ARCHITECTURE ...]` tries and prints.

Each cell is a tiny model that was exported and compared with PyTorch, or the words of its refusal. Without names, all
architectures are tried, in several processes, and the table of `docs/export.md` is written anew.
"""

import copy
import logging
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tabulate import tabulate

import hf_compress as hc
from tests.conftest import ARCHITECTURES, HEADS, _batches
from tests.contract.conftest import METHOD_CONFIGS, REFUSED


PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
BEGIN = "<!-- printed by `python -m tests.export_support` -->"
END = "<!-- end of what was printed -->"
# Decoders and models of sounds are exported with the head that they are used with; all others without one.
HEAD = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "opt"), "causal_lm")
HEAD |= dict.fromkeys(("wav2vec2", "wav2vec2-stable"), "ctc")
DENSE = "dense"
METHODS = (DENSE, *METHOD_CONFIGS)
NO_MODEL = "no such model"


def tiny(architecture):
    torch.manual_seed(0)
    return HEADS[HEAD.get(architecture, "base")].from_config(ARCHITECTURES[architecture]()).eval()


def verdict(architecture, method, dense, int8=True):
    """How far ONNX Runtime is from PyTorch on batches of several sizes, and int8 from both, or the reason why not."""
    if (method, architecture) in REFUSED:
        return NO_MODEL
    model = copy.deepcopy(dense)
    if method != DENSE:
        model = hc.compress(model, METHOD_CONFIGS[method](), data=_batches(model.config))
    checked = [_batches(model.config, count=1, size=size, length=length)[0] for size, length in ((4, 12), (2, 20))]
    try:
        report = _report(model, checked, int8)
    except ValueError as error:
        # What int8 is refused for is named so.
        return f"{verdict(architecture, method, dense, int8=False)}, no {error}" if int8 else str(error)
    exact = f"{report['largest_difference']:.0e}"
    if not int8:
        return exact
    kept = f", {len(report['int8']['kept'])} in float" if report["int8"]["kept"] else ""
    return f"{exact}, int8 {report['int8']['moved']:.2f}{kept}"


def _report(model, batches, int8):
    with tempfile.TemporaryDirectory() as place:
        return hc.export_onnx(model, f"{place}/model", batches, int8=int8, int8_bound=0.2)


def row(architecture):
    """The cells of an architecture, in the order of `METHODS`."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dense = tiny(architecture)
    cells = [verdict(architecture, method, dense) for method in METHODS]
    print(architecture, dict(zip(METHODS, cells, strict=True)), flush=True)
    return cells


def table(cells):
    """Markdown of architecture -> cells."""
    rows = [[name, *("" if cell == NO_MODEL else cell for cell in found)] for name, found in cells.items()]
    header = ["architecture", *(method.replace("_", " ") for method in METHODS)]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def main(named):
    architectures = named or list(ARCHITECTURES)
    with ProcessPoolExecutor(min(len(architectures), os.cpu_count() or 1)) as pool:
        cells = dict(zip(architectures, pool.map(row, architectures), strict=True))
    if not named:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(cells)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
