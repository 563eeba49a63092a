"""F1 of an extractive question answerer: dense, pruned without retraining, recovered, and reloaded.

    python benchmarks/question_answering.py --model MODEL --data_dir DATA/squad_dev --out qa.json \
        --ratios 0.7 0.5 --prune '{}' '{"target": "dense"}'

Every finished cell is written to the result file at once and skipped when the command is given again.
Columns: `question`, `context`, `answer_texts`, `answer_starts`. F1 is SQuAD's: lower case, no punctuation, no
articles, bag of words, best of the given answers.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import string
import time

import datasets
import torch
from accuracy import Results, label_of
from header import arguments_of, machine
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.stages.models import freeze_embeddings_


def normal(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction: str, answers: list[str]) -> float:
    best = 0.0
    for answer in answers:
        predicted, expected = normal(prediction), normal(answer)
        common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
        if common:
            precision, recall = common / len(predicted), common / len(expected)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def encode(rows: datasets.Dataset, tokenizer, length: int) -> datasets.Dataset:
    """Windows of question and context with the answer's token span, or [CLS] where the window misses it."""

    def windows(batch: dict) -> dict:
        encoded = tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=length, stride=length // 4,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
        )  # fmt: skip
        starts, ends, owners = [], [], encoded.pop("overflow_to_sample_mapping")
        for window, owner in enumerate(owners):
            first = batch["answer_starts"][owner][0]
            last = first + len(batch["answer_texts"][owner][0])
            sequence, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
            context = [i for i, part in enumerate(sequence) if part == 1]
            inside = offsets[context[0]][0] <= first and last <= offsets[context[-1]][1]
            starts.append(max((i for i in context if offsets[i][0] <= first), default=0) if inside else 0)
            ends.append(min((i for i in context if offsets[i][1] >= last), default=0) if inside else 0)
        encoded["start_positions"], encoded["end_positions"] = starts, ends
        encoded["row"] = [batch["row"][owner] for owner in owners]
        encoded["context_mask"] = [[int(s == 1) for s in encoded.sequence_ids(i)] for i in range(len(owners))]
        return dict(encoded)

    rows = rows.add_column("row", list(range(len(rows))))
    return rows.map(windows, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


@torch.no_grad()
def score(model, windows: datasets.Dataset, rows: datasets.Dataset) -> float:
    """Mean F1 in percent; spans of at most 30 tokens, best window of each question."""
    model.eval()
    best: dict[int, tuple[float, str]] = {}
    for start in range(0, len(windows), 32):
        batch = windows[start : start + 32]
        mask = torch.tensor(batch["attention_mask"])
        width = int(mask.sum(1).max())
        inputs = {k: torch.tensor(batch[k])[:, :width] for k in ("input_ids", "token_type_ids", "attention_mask")}
        output = model(**inputs)
        allowed = torch.tensor(batch["context_mask"])[:, :width].bool()
        first = output.start_logits.masked_fill(~allowed, -1e9)
        last = output.end_logits.masked_fill(~allowed, -1e9)
        pair = (first[:, :, None] + last[:, None, :]).triu()
        pair = pair.masked_fill(~torch.ones(width, width).triu().tril(29).bool(), -1e9)
        value, place = pair.flatten(1).max(1)
        for i, row in enumerate(batch["row"]):
            if row not in best or float(value[i]) > best[row][0]:
                offsets = batch["offset_mapping"][i]
                begin, end = offsets[int(place[i]) // width][0], offsets[int(place[i]) % width][1]
                best[row] = (float(value[i]), rows[row]["context"][begin:end])
    return 100 * sum(f1(text, rows[row]["answer_texts"]) for row, (_, text) in best.items()) / len(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs/squad")
    parser.add_argument("--train_rows", type=int, default=7602)
    parser.add_argument("--eval_rows", type=int, default=2968)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--recovery_epochs", type=float, default=1, help="Of the first of --prune; 0: none.")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7])
    parser.add_argument("--prune", type=json.loads, nargs="*", default=[{}], metavar="JSON")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    read = {n: datasets.Dataset.from_parquet(f"{args.data_dir}/{n}.parquet") for n in ("train", "validation")}
    header = arguments_of(args)
    for grows in ("ratios", "prune", "seeds"):
        header.pop(grows)
    results = Results(args.out, {"arguments": header, "environment": machine()})

    def collate(features: list[dict]) -> dict:
        batch = default_data_collator(features)
        width = int(batch["attention_mask"].sum(1).max())
        return {k: v[:, :width] if v.ndim == 2 else v for k, v in batch.items()}

    for seed in args.seeds:
        set_seed(seed)
        train = read["train"].shuffle(seed=seed).select(range(min(args.train_rows, len(read["train"]))))
        # The same questions for every seed, so that seeds differ by training and calibration alone.
        valid = read["validation"].shuffle(seed=0).select(range(min(args.eval_rows, len(read["validation"]))))
        windows = {n: encode(x, tokenizer, args.max_length) for n, x in (("train", train), ("valid", valid))}
        learn = windows["train"].remove_columns(["offset_mapping", "row", "context_mask"])
        learn = learn.filter(lambda end: end > 0, input_columns="end_positions")

        def trained(model, folder: str, epochs: float, teacher=None, learn=learn, seed=seed):
            options = {"alpha_layer": 1.0} if teacher is not None else {"alpha_output": 0.0}
            freeze_embeddings_(model)
            trainer = hc.DistillationTrainer(
                model=model, teacher_model=teacher, train_dataset=learn, data_collator=collate,
                processing_class=tokenizer, args=hc.DistillationArguments(
                    folder, num_train_epochs=epochs, learning_rate=3e-4, warmup_steps=0.1, save_strategy="no",
                    per_device_train_batch_size=16, logging_steps=50, report_to="none", disable_tqdm=True, seed=seed,
                    dataloader_pin_memory=False, **options,
                ),
            )  # fmt: skip
            trainer.train()
            trainer.save_model()

        def measured(folder: str, windows=windows, valid=valid) -> dict:
            return {"f1": round(score(opened(folder), windows["valid"], valid), 2)}

        place = f"{args.work_dir}/{seed}"
        dense = f"{place}-dense"

        def train_dense(dense=dense, trained=trained, measured=measured) -> dict:
            trained(AutoModelForQuestionAnswering.from_pretrained(args.model), dense, args.epochs)
            return measured(dense)

        results.cell(f"seed{seed}/dense", train_dense)
        sample = windows["train"].shuffle(seed=seed).select(range(args.samples))
        batches = [
            collate([{k: r[k] for k in learn.column_names} for r in sample.select(range(i, i + 16))])
            for i in range(0, args.samples, 16)
        ]
        for ratio in args.ratios:
            for number, fields in enumerate(args.prune):
                pruned = f"{place}-{ratio}-{number}"

                def prune(ratio=ratio, fields=fields, pruned=pruned, dense=dense, batches=batches, measured=measured):
                    model = opened(dense)
                    start = time.perf_counter()
                    hc.compress(model, hc.StructuredPruningConfig(mac_ratio=ratio, **fields), data=batches)
                    seconds = time.perf_counter() - start
                    model.save_pretrained(pruned)
                    return {**measured(pruned), "prune_seconds": round(seconds, 1)}

                results.cell(f"seed{seed}/{ratio}/{label_of(fields)}", prune)

            def recover(ratio=ratio, place=place, dense=dense, trained=trained, measured=measured) -> dict:
                trained(
                    opened(f"{place}-{ratio}-0"), f"{place}-{ratio}-recovered", args.recovery_epochs, opened(dense)
                )
                return measured(f"{place}-{ratio}-recovered")

            if args.recovery_epochs:
                results.cell(f"seed{seed}/{ratio}/recovered", recover)


def opened(folder: str) -> PreTrainedModel:
    return AutoModelForQuestionAnswering.from_pretrained(folder)


if __name__ == "__main__":
    main()
