"""Seconds of a training step of a classifier: with and without dropout, in single precision and under bf16 autocast.

    python benchmarks/training_step.py --model MODEL --out benchmarks/results/training_step.json

Embeddings are frozen, as `--freeze_embeddings` does it; a step is forward and backward. Tokens are random, and half of
the first row is padding. All four kinds of steps take turns; the fastest of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from header import arguments_of, commit, machine
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_compress.core.dropout import set_dropout_
from hf_compress.core.saving import write_json
from hf_compress.stages.models import freeze_embeddings_


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x128", "8x256", "8x512"], metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def step(model: PreTrainedModel, rows: int, tokens: int, bf16: bool) -> float:
    ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.zeros(rows, dtype=torch.long)).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    models = {}
    for name, dropout in (("dropout", None), ("no dropout", 0.0)):
        models[name] = AutoModelForSequenceClassification.from_pretrained(args.model).train()
        freeze_embeddings_(models[name])
        if dropout is not None:
            set_dropout_(models[name], dropout)
    load, found = os.getloadavg()[0], {}
    for shape in args.shapes:
        rows, tokens = map(int, shape.split("x"))
        kinds = [(name, bf16) for name in models for bf16 in (False, True)]
        runs = [[step(models[name], rows, tokens, bf16) for name, bf16 in kinds] for _ in range(args.repeats + 1)]
        # The first round fills caches.
        fastest = [min(times) for times in zip(*runs[1:], strict=True)]
        found[shape] = {
            f"{name}, {'bf16' if bf16 else 'fp32'}": round(seconds, 3)
            for (name, bf16), seconds in zip(kinds, fastest, strict=True)
        }
        print(shape, found[shape], flush=True)
    content = {"arguments": arguments_of(args), "commit": commit(), "environment": machine(load), "seconds": found}
    write_json(args.out, content)


if __name__ == "__main__":
    main()
