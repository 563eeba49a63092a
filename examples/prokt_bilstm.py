"""Train a BiLSTM with a BERT-base that stays near it (ProKT).

    python examples/prokt_bilstm.py --task_name mnli --sep_pair --out bilstm

The BiLSTM reads the teacher's word pieces. With `--sep_pair` it reads the two texts of a pair one by one, while the
teacher reads them as one; without, both read them as one. `--teacher_embeddings` starts its word embeddings from the
teacher's instead of random ones. Prints its metrics and the sizes of both models.

The defaults are the published ones for MNLI, where a batch had 256 examples.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="google-bert/bert-base-uncased", help="Hub name or folder.")
    parser.add_argument("--task_name")
    parser.add_argument("--data_dir")
    parser.add_argument("--sep_pair", action="store_true", help="Read the texts of a pair one by one.")
    parser.add_argument("--teacher_embeddings", action="store_true", help="Start from the teacher's embeddings.")
    parser.add_argument("--padding_read", action="store_true", help="The published arithmetic: padding is read, too.")
    parser.add_argument("--hidden_size", type=int, default=300)
    parser.add_argument("--embedding_size", type=int, default=300)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--proximal_weight", type=float, default=0.3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--teacher_learning_rate", type=float, default=3e-5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--num_train_epochs", type=float, default=6)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--compat", choices=("prokt",))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", default="bilstm")
    args = parser.parse_args()

    theirs, ours = (AutoTokenizer.from_pretrained(args.teacher) for _ in range(2))
    if args.sep_pair:
        hc.read_pairs_separately_(ours)
    limits = {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    task = hc.load_task(hc.DataArguments(task_name=args.task_name, data_dir=args.data_dir, **limits))
    train, valid = (task.encode(name, ours, args.max_length) for name in ("train", task.measured_split()))

    set_seed(args.seed)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, **task.head_settings())
    config = hc.BiLSTMConfig.for_tokenizer(
        ours,
        hidden_size=args.hidden_size,
        embedding_size=args.embedding_size,
        pair_mode="separate" if args.sep_pair else "joint",
        mask_padding=not args.padding_read,
        **task.head_settings(),
    )
    student = hc.BiLSTMForSequenceClassification(config)
    if args.teacher_embeddings:
        hc.students.start_embeddings_(student, teacher)

    collator = task.collator(ours)
    if args.sep_pair:
        joint = task.teacher_columns("train", theirs, args.max_length)
        for name in joint.column_names:
            train = train.add_column(f"teacher_{name}", joint[name][:])
        collator = hc.TeacherStudentCollator(collator, DataCollatorWithPadding(theirs))

    arguments = hc.ProximalArguments(
        args.out,
        proximal_weight=args.proximal_weight,
        learning_rate=args.learning_rate,
        teacher_learning_rate=args.teacher_learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        weight_decay=0.0,
        compat=args.compat,
        seed=args.seed,
        save_strategy="no",
        report_to="none",
    )
    trainer = hc.ProximalTrainer(
        student, teacher, arguments, train_dataset=train, data_collator=collator, processing_class=ours
    )
    trainer.train()
    trainer.save_model()
    print({name: round(value, 4) for name, value in hc.evaluate_model(trainer.model, valid, ours).items()})
    sizes = [hc.count_cost(model, args.max_length).params for model in (trainer.model, teacher)]
    print("parameters of student and teacher: {:,d} and {:,d}".format(*sizes))


if __name__ == "__main__":
    main()
