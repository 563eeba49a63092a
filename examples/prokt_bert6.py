"""Train a 6-layer BERT with a BERT-base that stays near it (ProKT), and what that is to be compared with.

    python examples/prokt_bert6.py --task_name mnli --out bert6

Both start from pretrained models; neither was trained on the task. Methods (`--methods`): `proximal`; `lambda_0` (the
teacher learns beside the student and is not held near it); `distillation` (the teacher is fine-tuned first, as long as
the student is trained, then frozen); `hard_labels` (no teacher). `--layers 6` takes the student's layers from the
teacher instead of `--student`. `hf-compress proximal --baselines ...` does the same, and goes on when interrupted.

Prints the metrics of the validation split, or of the test split of a task that has no other. The defaults are the
published ones for MNLI, where a batch had 256 examples: use --batch_size and --accumulation to have as many.
"""

from __future__ import annotations

import argparse

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

import hf_compress as hc


METHODS = ("proximal", "hard_labels", "distillation", "lambda_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="google-bert/bert-base-uncased", help="Hub name or folder.")
    parser.add_argument("--student", default="google/bert_uncased_L-6_H-768_A-12", help="Hub name or folder.")
    parser.add_argument("--layers", type=int, help="Take this many of the teacher's layers instead of --student.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["proximal"])
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--proximal_weight", type=float, default=0.4)
    parser.add_argument("--prox_mode", choices=("fixed", "dual"), default="fixed")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--teacher_learning_rate", type=float, default=3e-5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--num_train_epochs", type=float, default=6)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--compat", choices=("prokt",))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", default="bert6")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    limits = {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    task = hc.load_task(hc.DataArguments(task_name=args.task_name, data_dir=args.data_dir, **limits))
    train, valid = (task.encode(name, tokenizer, args.max_length) for name in ("train", task.measured_split()))

    def opened(name: str) -> AutoModelForSequenceClassification:
        set_seed(args.seed)  # A new head is drawn here.
        return AutoModelForSequenceClassification.from_pretrained(name, **task.head_settings())

    def student() -> AutoModelForSequenceClassification:
        return hc.students.from_teacher(opened(args.teacher), args.layers) if args.layers else opened(args.student)

    schedule = {
        "per_device_train_batch_size": args.batch_size, "gradient_accumulation_steps": args.accumulation,
        "num_train_epochs": args.num_train_epochs, "max_steps": args.max_steps, "seed": args.seed,
        "weight_decay": 0.0, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    rest = {
        "train_dataset": train,
        "eval_dataset": valid,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }

    def proximal(name: str, teacher: AutoModelForSequenceClassification, **changes: object) -> hc.ProximalTrainer:
        settings = {
            "proximal_weight": args.proximal_weight, "prox_mode": args.prox_mode, "temperature": args.temperature,
            "learning_rate": args.learning_rate, "teacher_learning_rate": args.teacher_learning_rate,
            "compat": args.compat, **schedule, **changes,
        }  # fmt: skip
        arguments = hc.ProximalArguments(f"{args.out}/{name}", **settings)
        return hc.ProximalTrainer(student(), teacher, arguments, **rest)

    def alone(name: str, model: AutoModelForSequenceClassification, rate: float) -> hc.CompressionTrainer:
        arguments = TrainingArguments(f"{args.out}/{name}", learning_rate=rate, **schedule)
        return hc.CompressionTrainer(model, arguments, **rest)

    for method in args.methods:
        if method == "hard_labels":
            trainer = alone(method, student(), args.learning_rate)
        elif method == "distillation":
            tuned = alone("tuned_teacher", opened(args.teacher), args.teacher_learning_rate)
            tuned.train()
            trainer = proximal(method, tuned.model, teacher_learning_rate=0.0, proximal_weight=0.0, prox_mode="fixed")
        elif method == "lambda_0":
            trainer = proximal(method, opened(args.teacher), proximal_weight=0.0, prox_mode="fixed")
        else:
            trainer = proximal(method, opened(args.teacher))
        trainer.train()
        trainer.save_model()
        metrics = hc.evaluate_model(trainer.model, valid, tokenizer)
        print(method, {name: round(value, 4) for name, value in metrics.items()})


if __name__ == "__main__":
    main()
