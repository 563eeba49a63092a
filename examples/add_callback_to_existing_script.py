"""An ordinary Trainer script, and the three lines (marked `# +`) that prune its model to 2:4 while it trains.

    python examples/add_callback_to_existing_script.py --model distilbert-base-uncased --task_name sst2 --out sparse

Without those lines it is the script one has already; nothing else knows of pruning. `--data_dir DIR` reads
`DIR/{train,validation}.parquet` (columns `sentence` and `label`) instead of the hub. Prints the metrics of the
validation split and the fraction of zeros in one of the weights. The saved model opens with stock transformers. A
trial of 96 steps:

    python examples/add_callback_to_existing_script.py --model DENSE --data_dir DIR --max_train_samples 256
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import hf_compress as hc  # +


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task_name", default="sst2", choices=("sst2", "cola"), help="Of GLUE, with one sentence.")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", default="sparse")
    parser.add_argument("--max_steps", type=int, default=-1, help="More than one epoch; the last prunes no more.")
    parser.add_argument("--max_train_samples", type=int)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = {name: f"{args.data_dir}/{name}.parquet" for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files) if args.data_dir else load_dataset("glue", args.task_name)
    data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    if args.max_train_samples:
        data["train"] = data["train"].select(range(args.max_train_samples))
    model = AutoModelForSequenceClassification.from_pretrained(args.model)

    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, cooldown_epochs=1)  # +
    trainer = Trainer(
        model=model,
        args=TrainingArguments(args.out, num_train_epochs=3, learning_rate=5e-5, max_steps=args.max_steps),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        callbacks=[hc.WeightPruningCallback(config)],  # +
    )
    trainer.train()
    trainer.save_model()
    print(trainer.evaluate())
    name, weight = next((n, p) for n, p in model.named_parameters() if "layer" in n and p.ndim == 2)
    print(f"{name}: {float((weight == 0).float().mean()):.4f} zeros")


if __name__ == "__main__":
    main()
