"""Let a fine-tuned classifier drop tokens: learned thresholds, a fixed fraction (top-k), or a threshold set by hand.

    python examples/token_pruning.py --model textattack/bert-base-uncased-SST-2 --task_name sst2 --mode learned

Prints accuracy and the share of the arithmetic that is left, and writes `words.html`: which words of three sentences
survive each layer.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--mode", choices=("learned", "topk", "manual"), default="learned")
    parser.add_argument("--target", type=float, default=0.6, help="Relative MACs, for learned.")
    parser.add_argument("--keep_rate", type=float, default=0.3, help="For topk.")
    parser.add_argument("--threshold", type=float, default=0.01, help="For manual.")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--out", default="fewer_tokens")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    task = hc.load_task(hc.DataArguments(task_name=args.task_name, data_dir=args.data_dir)).matched(model.config)
    splits = ("train", task.measured_split())
    train, valid = (task.encode(name, tokenizer, 128) for name in splits)
    print(f"measured on the {splits[1]} split")
    callbacks = []
    if args.mode == "topk":
        config = hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=args.keep_rate)
    elif args.mode == "manual":
        config = hc.TokenPruningConfig(final_token_threshold=args.threshold)
    else:
        config = hc.TokenPruningConfig(masking_mode="soft")
        annealing = hc.ThresholdAnnealingCallback(2e-3, 1e-4, target_relative_macs=args.target, learning_rate=2e-4)
        callbacks = [annealing, hc.StageSwitchCallback(0.5)]
    hc.compress(model, config)
    trainer = hc.CompressionTrainer(
        model=model,
        args=TrainingArguments(args.out, learning_rate=5e-5, max_steps=args.max_steps, report_to="none"),
        train_dataset=train,
        eval_dataset=valid,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: task.training_metrics(p.predictions, p.label_ids),
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    print(args.mode, {name: metrics[name] for name in ("eval_accuracy", "eval_relative_macs") if name in metrics})
    texts = task.split(splits[1])[task.text_columns[0]][:3]
    hc.write_token_page(f"{args.out}/words.html", [hc.trace_tokens(model, tokenizer, text) for text in texts])


if __name__ == "__main__":
    main()
