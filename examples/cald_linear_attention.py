"""Turn an encoder's attention into linear attention while fine-tuning it, guided by a teacher.

    python examples/cald_linear_attention.py --mode trajectory --model roberta-base --task_name imdb --max_length 512

Modes: `unguided`, `target` and `hybrid` (need `--teacher`, a fine-tuned dense model), `trajectory` (the teacher is
fine-tuned at the same time), `waypoint` (needs `--snapshots`, saved states of a dense fine-tuning, in quotes; with
`hf-compress finetune --save_total_limit 10` it keeps ten of them, otherwise one). `--student_reinit` lets target and
hybrid start from `--model` instead of the teacher.
Prints the metrics of the validation split, or of the test split of a task that has no other (IMDB).
"""

from __future__ import annotations

import argparse
import copy

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = ("unguided", "target", "hybrid", "trajectory", "waypoint")
    parser.add_argument("--mode", choices=modes, default="trajectory")
    parser.add_argument("--model", required=True, help="Pretrained encoder.")
    parser.add_argument("--teacher", help="Fine-tuned dense model, for target and hybrid.")
    parser.add_argument("--snapshots", help="Pattern of saved dense models, for waypoint.")
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--share", default="none")
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--hybrid_steps", type=int, default=1000)
    parser.add_argument("--student_reinit", action="store_true")
    parser.add_argument("--compat", choices=("cald",))
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--teacher_learning_rate", type=float, default=3e-5)
    parser.add_argument("--teacher_update_cycle", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_train_epochs", type=float, default=3)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", default="linear")
    args = parser.parse_args()
    for name, needed in (("teacher", ("target", "hybrid")), ("snapshots", ("waypoint",))):
        if args.mode in needed and not getattr(args, name):
            parser.error(f"--mode {args.mode} needs --{name}")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = hc.load_task(hc.DataArguments(task_name=args.task_name, data_dir=args.data_dir))
    origin = args.teacher if args.mode in ("target", "hybrid") and not args.student_reinit else args.model
    set_seed(args.seed)  # A new head is drawn here.
    student = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=task.num_labels)
    task = task.matched(student.config)
    splits = ("train", task.measured_split())
    train, valid = (task.encode(name, tokenizer, args.max_length) for name in splits)
    dense = copy.deepcopy(student)
    hc.compress(student, hc.LinformerConfig(projected_length=args.slots, share=args.share))

    guided = {"alpha_layer": 0.0 if args.mode == "unguided" else args.alpha_layer, "alpha_output": 0.0}
    common = {
        "output_dir": args.out, "learning_rate": args.learning_rate, "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": args.num_train_epochs, "max_steps": args.max_steps, "seed": args.seed,
        "compat": args.compat, **guided,
    }  # fmt: skip
    rest = {"train_dataset": train, "data_collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer}
    if args.mode == "trajectory":
        # Both set out from one point, a new head included.
        rates = {
            "teacher_learning_rate": args.teacher_learning_rate,
            "teacher_update_cycle": args.teacher_update_cycle,
        }
        joint = hc.JointTeacherArguments(**common, **rates)
        trainer = hc.JointTeacherTrainer(model=student, teacher_model=dense, args=joint, **rest)
    elif args.mode == "waypoint":
        ladder = hc.SnapshotTeacherArguments(**common, teacher_snapshots=[args.snapshots])
        trainer = hc.SnapshotTeacherTrainer(model=student, args=ladder, **rest)
    else:
        fixed = hc.DistillationArguments(
            **common, max_distill_steps=args.hybrid_steps if args.mode == "hybrid" else None
        )
        teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher) if args.mode != "unguided" else None
        trainer = hc.DistillationTrainer(model=student, teacher_model=teacher, args=fixed, **rest)
    trainer.train()
    trainer.save_model()
    print(args.mode, hc.evaluate_model(student, valid, tokenizer))


if __name__ == "__main__":
    main()
