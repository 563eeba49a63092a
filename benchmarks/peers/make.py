"""What other libraries make of a dense classifier: each peer in a folder of its own, with the seconds it took.

    python -m benchmarks.peers.make --dense DENSE --small SMALL --encoder ENCODER \
        --data_dir DATA/sst2_sentences --out OUT

README.md beside this file has the environment; `table` measures what is made here. What is there already stays.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.header import commit, machine
from benchmarks.peers.setting import Setting, add_arguments, clocked
from hf_compress.core.saving import write_json


# Name of a peer -> the distribution whose version is noted. `by_<name>.py` makes it.
PEERS = {
    "dense": "onnxruntime",
    "openvino": "nncf",
    "torch_pruning": "torch-pruning",
    "textbrewer": "textbrewer",
    "small": "transformers",
    "model2vec": "model2vec",
}
MADE = "made.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--small", help="A pretrained model of fewer layers, for `small`.")
    parser.add_argument("--encoder", help="A sentence encoder, for `model2vec`.")
    parser.add_argument("--out", required=True, help="Folder for all peers.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--epochs", type=int, default=3, help="Of every training, as of our students.")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="Mixed precision, where our models were trained with it.")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """Make one peer; returns what is to be known about it.

    A peer's module has `make(setting, folder)`, which saves it and returns the model, and `opened(setting, folder,
    model)`, which opens what was saved. `EXPORTED` says whether ONNX Runtime shall serve it.
    """
    peer = importlib.import_module(f"benchmarks.peers.by_{name}")
    folder.mkdir(parents=True, exist_ok=True)
    model, seconds = clocked(lambda: peer.make(setting, folder))
    found = {"version": importlib.metadata.version(PEERS[name]), "settings": peer.SETTINGS, "seconds": seconds}
    found["opened"] = peer.opened(setting, folder, model)
    if peer.EXPORTED:
        report, found["export_seconds"] = clocked(lambda: setting.export(model, folder))
        found["export"] = {key: report[key] for key in ("first_token_alone", "int8")}
    return found


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    setting = Setting(args)
    for name in args.peers:
        folder = Path(args.out, name)
        if (folder / MADE).exists():
            continue
        torch.manual_seed(args.seed)
        found = make(name, setting, folder)
        trained = {key: getattr(args, key) for key in ("epochs", "learning_rate", "batch_size", "bf16", "seed")}
        content = {"peer": name, "training": trained, **found, "commit": commit(), "environment": machine()}
        write_json(folder / MADE, content)
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
