"""Shrink a fine-tuned classifier to half its arithmetic and teach it what it knew.

    python examples/shrink_and_recover.py --model textattack/bert-base-uncased-SST-2 --task_name sst2 --out small

Any fine-tuned sequence classifier and GLUE task work; `--data_dir DIR` reads `DIR/{train,validation}.parquet` instead
of the hub. Prints the accuracy before, after pruning, and after recovery.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--out", default="small")
    parser.add_argument("--mac_ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=-1)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.model)
    student = AutoModelForSequenceClassification.from_pretrained(args.model)
    task = hc.load_task(hc.DataArguments(task_name=args.task_name, data_dir=args.data_dir)).matched(student.config)
    length = min(128, tokenizer.model_max_length)
    splits = ("train", task.measured_split())
    train, valid = (task.encode(name, tokenizer, length) for name in splits)
    print(f"measured on the {splits[1]} split")
    print("dense    ", hc.evaluate_model(teacher, valid, tokenizer))

    config = hc.StructuredPruningConfig(mac_ratio=args.mac_ratio)
    hc.compress(student, config, data=hc.calibration_batches(train, tokenizer, args.samples, seed=0))
    print("pruned   ", hc.evaluate_model(student, valid, tokenizer))

    trainer = hc.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=hc.DistillationArguments(args.out, alpha_layer=1.0, learning_rate=5e-5, max_steps=args.max_steps),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    print("recovered", hc.evaluate_model(student, valid, tokenizer))
    reopened = AutoModelForSequenceClassification.from_pretrained(args.out)
    print("reopened ", hc.evaluate_model(reopened, valid, tokenizer))


if __name__ == "__main__":
    main()
