"""One table of our compressed models and of what other libraries give, on the same sentences and in one process.

    python -m benchmarks.peers.table --dense DENSE --ours taught-0.2=FOLDER retaught-0.2=FOLDER --peers OUT \
        --data_dir DATA/sst2_sentences --out benchmarks/results/peers_sst2.json

`make` has filled the folder of `--peers`. All models take turns on the same length-sorted sentences; speed-ups are
medians of the ratios of rounds, over the dense model in PyTorch and over its fastest int8 form in ONNX Runtime.
Tokenizers are not timed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from benchmarks.header import arguments_of, commit, machine
from benchmarks.peers.by_model2vec import PIPELINE, Static
from benchmarks.peers.by_openvino import FLOAT, INT8, WEIGHTS, OpenvinoAlone
from benchmarks.peers.make import MADE
from benchmarks.peers.setting import Setting, add_arguments, clocked, exported
from benchmarks.records.__main__ import main_metric, per_tensor
from hf_compress.core.exported import ExportedModel
from hf_compress.core.saving import write_json
from hf_compress.report.latency import batches_by_length, batches_of, measure_latency, speedups
from hf_compress.report.machine import OtherWork
from hf_compress.report.quality import Measured, evaluated


DENSE, ORT_INT8 = "dense, PyTorch", "dense, ONNX Runtime int8"
SPLITS = ("validation", "test")
# It zeroes weights of dense shapes, which nothing here computes faster. Measured in an old environment of its own.
ELSEWHERE = "Intel Neural Compressor 3.7.1, weight pruning: dense shapes, no speed-up (results/peer_inc.json)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--ours", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--peers", required=True, help="The folder that `make` filled.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--examples", type=int, default=128, help="Timed examples, evenly spread over the lengths.")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


class Compiled(ExportedModel):
    """A model after `torch.compile`, for any batch size and length."""

    runtime = "torch.compile"

    def __init__(self, model: PreTrainedModel, file: Path) -> None:
        super().__init__(file, ["input_ids", "attention_mask", "token_type_ids"], ["logits"], model.config)
        self.compiled = torch.compile(model, dynamic=True)

    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [self.compiled(**inputs).logits]


@dataclass(frozen=True)
class Form:
    """One row: what is called, of which peer (or model of ours), and the bytes of what is served."""

    module: nn.Module
    peer: str
    num_bytes: int


def of_file(module: ExportedModel, peer: str) -> Form:
    return Form(module, peer, module.num_bytes())


def students(setting: Setting, peers: Path, ours: Mapping[str, Path]) -> dict[str, Form]:
    """Smaller models, ours and theirs: in PyTorch, and in ONNX Runtime int8 by our export."""
    folders = {name: (peers / name / "model", peers / name) for name in ("torch_pruning", "textbrewer", "small")}
    folders |= {name: (folder, peers / f"ours-{name}") for name, folder in ours.items()}
    found = {}
    for name, (folder, place) in folders.items():
        if not exported(place):
            _, seconds = clocked(partial(setting.export, setting.open(folder), place))
            write_json(place / MADE, {"export_seconds": seconds})
        whole = place / "model.pt"
        model = torch.load(whole, weights_only=False) if whole.exists() else setting.open(folder)
        file = whole if whole.exists() else folder / "model.safetensors"
        found[f"{name}, PyTorch"] = Form(model, name, file.stat().st_size)
        int8 = hc.OnnxModel.from_pretrained(place / "exported", int8=True)
        found[f"{name}, ONNX Runtime int8"] = of_file(int8, name)
    return found


def forms(setting: Setting, peers: Path, ours: Mapping[str, Path]) -> dict[str, Form]:
    """All rows of the table."""
    weights, graphs, files = (
        Path(setting.args.dense, "model.safetensors"),
        peers / "dense/exported",
        peers / "openvino",
    )
    dense = setting.open()
    number = weights.stat().st_size
    found = {
        DENSE: Form(dense, "dense", number),
        "dense, PyTorch bf16": Form(setting.open().bfloat16(), "dense", number // 2),
        "dense, torch.compile": Form(Compiled(setting.open(), weights), "torch.compile", number),
        "dense, ONNX Runtime": of_file(hc.OnnxModel.from_pretrained(graphs), "dense"),
        ORT_INT8: of_file(hc.OnnxModel.from_pretrained(graphs, int8=True), "dense"),
        f"{ORT_INT8}, per tensor": of_file(hc.OnnxModel(per_tensor(graphs), dense.config), "dense"),
        "dense, OpenVINO": of_file(OpenvinoAlone(files / FLOAT, dense.config), "openvino"),
        "dense, OpenVINO int8 weights": of_file(OpenvinoAlone(files / WEIGHTS, dense.config), "openvino"),
        "dense, OpenVINO int8": of_file(OpenvinoAlone(files / INT8, dense.config), "openvino"),
    }
    found |= students(setting, peers, ours)
    return found | {"model2vec": of_file(Static(peers / "model2vec" / PIPELINE, setting), "model2vec")}


def quality(setting: Setting, module: nn.Module, split: str) -> float:
    """Accuracy in percent."""
    own = isinstance(module, Static)
    rows, processor = (module.rows(split), module.tokenizer) if own else (setting.rows(split), setting.tokenizer)
    return main_metric(evaluated(Measured(module, rows, processor, setting.task, split)).metrics())


def batches(setting: Setting, found: Mapping[str, Form], size: int) -> dict[str, list[dict[str, Tensor]]]:
    """The same sentences for everybody, each model's in its own tokens."""
    rows = setting.rows("validation")
    chosen = batches_by_length(rows, size, setting.args.examples)
    common = batches_of(rows, setting.tokenizer, chosen)
    return {
        name: batches_of(form.module.rows("validation"), form.module.tokenizer, chosen)
        if isinstance(form.module, Static)
        else common
        for name, form in found.items()
    }


def timed(setting: Setting, found: Mapping[str, Form], size: int) -> dict[str, Any]:
    """Latencies and speed-ups of all rows in one interleaved run; then latencies of each row by itself."""
    others, given, repeats = OtherWork(), batches(setting, found, size), setting.args.repeats
    modules = {name: form.module for name, form in found.items()}
    latencies = measure_latency(modules, given, repeats, warmup=2)
    # Whoever takes turns finds other models in the caches; runtimes differ in what that costs them.
    alone = {name: measure_latency({name: each}, given[name], repeats, warmup=2)[0] for name, each in modules.items()}
    load = others.until_now()
    small = min((x for x in latencies if x.name.startswith(ORT_INT8)), key=lambda x: x.p50)
    over = {"PyTorch": speedups(latencies, DENSE), "int8": speedups(latencies, small.name)}
    return {
        "baseline": small.name, "other_work": load, "p50": {x.name: x.p50 for x in latencies},
        "p50_alone": {name: x.p50 for name, x in alone.items()},
        "speedups": {name: {base: asdict(ratios[name]) for base, ratios in over.items()} for name in found},
    }  # fmt: skip


@torch.inference_mode()
def compile_seconds(setting: Setting, found: Mapping[str, Form]) -> dict[str, float]:
    """What the first calls of the compiled model take; the first of each batch size compiles."""
    name = next(name for name, form in found.items() if isinstance(form.module, Compiled))
    first = [batches(setting, {name: found[name]}, size)[name][0] for size in setting.args.batch_sizes]
    return clocked(lambda: [found[name].module(**batch) for batch in first])[1]


def seconds_of_stages(folder: Path, dense: Path) -> float:
    """Wall seconds of the commands that made a model of ours out of the dense one."""
    if folder.resolve() == dense.resolve():
        return 0.0
    stage = json.loads((folder / "stage.json").read_text())
    before = sum(seconds_of_stages(folder.parent / name, dense) for name in stage["inputs"]["stages"])
    return float(before + stage["seconds"])


def made(setting: Setting, peers: Path, ours: Mapping[str, Path]) -> dict[str, Any]:
    """What is known of how each peer, and each model of ours, was made and opens again."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(peers.glob(f"*/{MADE}"))}
    for name, folder in ours.items():
        graph = hc.OnnxModel.from_pretrained(peers / f"ours-{name}" / "exported")
        seconds = {"wall": round(seconds_of_stages(folder, Path(setting.args.dense)), 1)}
        # The export has compared the graph with the model.
        found[name] = {**found.pop(f"ours-{name}"), "seconds": seconds, "opened": setting.opened(folder, graph)}
    return found


def table(content: Mapping[str, Any], sizes: Sequence[int]) -> str:
    """Markdown: accuracies, of each batch size milliseconds and speed-ups, megabytes, wall seconds, how it opens."""
    head = ["", *SPLITS, *(f"batch {size}" for size in sizes), "MB", "seconds to make", "`from_pretrained`"]
    lines = [head, ["---"] * len(head)]
    for name, row in content["forms"].items():
        cells = [name, *(f"{row[split]:.2f}" for split in SPLITS)]
        for size in map(str, sizes):
            run = content["timed"][size]
            both = " / ".join(f"{run['speedups'][name][base]['median']:.2f}" for base in ("PyTorch", "int8"))
            cells.append(f"{1e3 * run['p50'][name]:.2f} ms ({1e3 * run['p50_alone'][name]:.2f}), {both}")
        about = content["made"][row["peer"]]
        seconds = about["seconds"]["wall"] + (about["export_seconds"]["wall"] if "ONNX" in name else 0)
        opens = name.endswith(("PyTorch", "bf16")) and about["opened"]["from_pretrained"]
        lines.append([*cells, f"{row['bytes'] / 1e6:.1f}", f"{seconds:.0f}", "yes" if opens else "no"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{ELSEWHERE}"


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    setting, peers = Setting(args), Path(args.peers)
    ours = {name: Path(folder) for name, folder in (entry.split("=", 1) for entry in args.ours)}
    header = {**arguments_of(args), "dense": Path(args.dense).name, "ours": list(ours)}
    header.pop("peers")
    content: dict[str, Any] = {"arguments": header, "commit": commit(), "environment": machine()}
    found = forms(setting, peers, ours)
    content["made"] = made(setting, peers, ours)
    opened = {"from_pretrained": False, "error": "compiled anew by each process"}
    content["made"]["torch.compile"] = {"seconds": compile_seconds(setting, found), "opened": opened}
    content["timed"] = {str(size): timed(setting, found, size) for size in args.batch_sizes}
    content["forms"] = {
        name: {
            "peer": form.peer,
            "bytes": form.num_bytes,
            **{split: quality(setting, form.module, split) for split in SPLITS},
        }
        for name, form in found.items()
    }
    content["elsewhere"] = ELSEWHERE
    write_json(Path(args.out), content)
    print(table(content, args.batch_sizes))


if __name__ == "__main__":
    main()
