"""Prune the weights of a fine-tuned classifier while it trains on, alone or taught by what it was.

    python examples/prune_weights.py --model DENSE --task_name sst2 --pattern 2:4 --target_sparsity 0.5 --out sparse
    python examples/prune_weights.py --model DENSE --teacher DENSE --task_name sst2 --pruning_configs mixed.yaml

Without `--teacher` a stock `Trainer` learns from the labels. With it, `DistillationTrainer` follows the published
recipe: the student imitates the teacher's last hidden state instead of the labels, at a constant learning rate, and
the head stays as it is. `--pruning_configs` is a YAML list with one entry for each set of layers; its keys, ours or
those of the original, win over the flags:

    - {op_names: [.*output, .*intermediate], pattern: 1x1, pruning_scope: local}
    - {op_names: [.*query, .*key, .*value], pattern: 4x1, min_sparsity_ratio_per_op: 0.5}

`--data_dir DIR` reads `DIR/{train,validation}.parquet` instead of the hub. Prints the metrics of the validation split
and the fraction of zeros, before and after; what is saved opens with stock transformers. A trial of 40 steps:

    python examples/prune_weights.py --model DENSE --data_dir DIR --max_train_samples 256 --pruning_frequency 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc


# What the original calls these fields.
NAMES = {"pruning_type": "criterion", "pruning_scope": "scope"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Fine-tuned dense classifier.")
    parser.add_argument("--teacher", help="Usually the same one.")
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--pattern", default="4x1")
    parser.add_argument("--target_sparsity", type=float, default=0.9)
    parser.add_argument("--pruning_configs", help="YAML file with a list.")
    parser.add_argument("--pruning_frequency", type=int, default=50, help="Steps between updates.")
    parser.add_argument("--warmup_epochs", type=float, default=1)
    parser.add_argument("--cooldown_epochs", type=float, default=1)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--alpha_layer", type=float, default=5.0, help="Weight of the distance of hidden states.")
    parser.add_argument("--out", default="sparse")
    return parser.parse_args()


def pruning_config(args: argparse.Namespace) -> hc.WeightPruningConfig:
    """The flags, and the entries of the YAML file as sets of layers of their own."""
    entries = yaml.safe_load(Path(args.pruning_configs).read_text()) if args.pruning_configs else []
    fields = ("pattern", "target_sparsity", "pruning_frequency", "warmup_epochs", "cooldown_epochs")
    return hc.WeightPruningConfig(
        **{name: getattr(args, name) for name in fields},
        local_configs=[{NAMES.get(key, key): value for key, value in entry.items()} for entry in entries],
    )


def zeros(model: torch.nn.Module) -> str:
    """The fraction of zeros in the weights of all linear layers, the head's included."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    nonzero = sum(int(weight.count_nonzero()) for weight in weights)
    return f"{1 - nonzero / sum(weight.numel() for weight in weights):.4f} zeros"


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = hc.DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_train_samples=args.max_train_samples, max_length=64
    )
    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    task = hc.load_task(data).matched(model.config)
    splits = ("train", task.measured_split())
    train, valid = (task.encode(name, tokenizer, 64) for name in splits)
    print(f"measured on the {splits[1]} split")
    print("dense ", hc.evaluate_model(model, valid, tokenizer), zeros(model))

    common = {
        "model": model,
        "train_dataset": train,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
        "callbacks": [hc.WeightPruningCallback(pruning_config(args))],
    }
    training = {
        "output_dir": args.out,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
        "report_to": "none",
    }
    if args.teacher:
        teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher)
        layers = model.config.num_hidden_layers
        recipe = hc.DistillationArguments(
            **training,
            alpha_task=0.0,
            alpha_output=0.0,
            alpha_layer=args.alpha_layer,
            layer_map=[-1] * (layers - 1) + [teacher.config.num_hidden_layers - 1],
            lr_scheduler_type="constant",
            adam_beta2=0.9,
        )
        trainer = hc.DistillationTrainer(teacher_model=teacher, args=recipe, **common)
    else:
        trainer = Trainer(args=TrainingArguments(**training), **common)
    trainer.train()
    trainer.save_model()
    sparse = AutoModelForSequenceClassification.from_pretrained(args.out)
    print("sparse", hc.evaluate_model(sparse, valid, tokenizer), zeros(sparse))


if __name__ == "__main__":
    main()
