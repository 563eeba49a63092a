"""A folder with models, data and recipes that tests run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertModel

from tests.test_bad_input import WORDS, write_model, write_tokenizer


SHARED = {
    "output_dir": "out", "model_name_or_path": "encoder", "data_dir": "data", "max_length": 16, "device": "cpu",
    "num_train_epochs": 1, "per_device_train_batch_size": 16,
}  # fmt: skip
# For recipes without a training, which have no option for these.
UNTRAINED = {"num_train_epochs": None, "per_device_train_batch_size": None}
TEACHER = {"stage": "finetune", "name": "teacher", "model_name_or_path": "base"}
PRUNED = {"stage": "structured_pruning", "name": "pruned", "model_name_or_path": "teacher", "mac_ratio": 0.5}
RECOVERED = {
    "stage": "distill", "name": "recovered", "model_name_or_path": "pruned", "teacher_name_or_path": "teacher"
}  # fmt: skip
LINEAR = {
    "stage": "linformer", "name": "linear", "model_name_or_path": "classifier", "projected_length": 4, "data_dir": "b"
}  # fmt: skip


def write_place(root: Path) -> None:
    """An encoder without a head, a classifier, two folders of data."""
    write_encoder(root / "encoder")
    write_model(root / "classifier")
    write_model(root / "three", num_labels=3, id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90} w{i % 7}\t{i % 2}" for i in range(64)]
    for folder in ("data", "b"):
        (root / folder).mkdir()
        for split in ("train", "validation"):
            (root / folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (root / "untold").mkdir()
    (root / "untold" / "train.tsv").write_text("\n".join(["blurb\tscore", *rows]) + "\n")
    (root / "strange").mkdir()
    (root / "strange" / "stage.json").write_text('{"of": "another program"}')
    (root / "unmeasured").mkdir()
    shutil.copy(root / "data" / "train.tsv", root / "unmeasured")


def write_encoder(folder: Path, layers: int = 2) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=32)).save_pretrained(folder)
    write_tokenizer(folder)


def write_recipe(file: Path, *stages: dict, **shared: object) -> str:
    """A recipe with values for all stages; None removes one."""
    values = {name: value for name, value in {**SHARED, **shared}.items() if value is not None}
    file.write_text(yaml.safe_dump({**values, "stages": list(stages)}, sort_keys=False))
    return str(file)
