"""Sentence vectors of a pruned or quantised encoder, without a label and without training.

    python benchmarks/embeddings.py --model MODEL --data DATA --out x.json --ratios 0.7 0.5 0.4 0.3 \
        --prune '{}' '{"target": "dense", "allocation": "divergence"}' --quantize '{"bits": 4, "group_size": 64}'

Calibration: plain sentences of STS-B's training split, and questions and paragraphs of the training articles of
`squad_dev`. Measured: Spearman's correlation on STS-B's test split, and how often the paragraph of a question is the
nearest one, or among the ten nearest, in the other articles of `squad_dev`. Nothing was chosen on those splits. Every
finished cell is written to the result file at once and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accuracy import Results, label_of
from datasets import Dataset
from header import machine
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.shared_passes import shared_passes


LONGEST = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="The folder with stsb and squad_dev.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--ratios", type=float, nargs="*", default=[])
    parser.add_argument("--prune", type=json.loads, nargs="*", default=[{}], metavar="JSON")
    parser.add_argument("--quantize", type=json.loads, nargs="*", default=[], metavar="JSON")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))


@torch.no_grad()
def vectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """[texts, D]: means over real tokens, of length one."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = encoded(tokenizer, [texts[row] for row in rows])
        live = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state * live
        means = torch.nn.functional.normalize(states.sum(1) / live.sum(1), dim=-1)
        found.update(zip(rows, means, strict=True))
    return torch.stack([found[row] for row in range(len(texts))])


class Measures:
    """The two measurements, with their texts.

    Args:
        data: The folder with both data sets.
        tokenizer: Of the model.
    """

    def __init__(self, data: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pairs = Dataset.from_parquet(f"{data}/stsb/test.parquet")
        answers = Dataset.from_parquet(f"{data}/squad_dev/validation.parquet")
        self._questions, owners = answers["question"][:], answers["context"][:]
        self._paragraphs = list(dict.fromkeys(owners))
        place = {text: number for number, text in enumerate(self._paragraphs)}
        self._wanted = torch.tensor([place[text] for text in owners])

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        model.eval()
        one, other = (vectors(model, self._tokenizer, self._pairs[name][:]) for name in ("sentence1", "sentence2"))
        questions, paragraphs = (vectors(model, self._tokenizer, x) for x in (self._questions, self._paragraphs))
        scores = questions @ paragraphs.T
        before = (scores > scores.gather(1, self._wanted[:, None])).sum(1)
        return {
            "stsb_spearman": round(float(spearmanr((one * other).sum(1), self._pairs["label"][:]).statistic), 4),
            "recall_at_1": round(float((before == 0).float().mean()), 4),
            "recall_at_10": round(float((before < 10).float().mean()), 4),
        }


def calibration(data: str, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int) -> list[dict[str, Tensor]]:
    """Half of the texts are sentences, a quarter questions, a quarter paragraphs."""
    pairs = Dataset.from_parquet(f"{data}/stsb/train.parquet")
    answers = Dataset.from_parquet(f"{data}/squad_dev/train.parquet")
    drawing = np.random.default_rng(seed)
    texts: list[str] = []
    for source, number in (
        (pairs["sentence1"][:] + pairs["sentence2"][:], samples // 2),
        (answers["question"][:], samples // 4),
        (answers["context"][:], samples // 4),
    ):
        distinct = list(dict.fromkeys(source))
        texts += [distinct[row] for row in drawing.choice(len(distinct), number, replace=False)]
    # Alike in length, so that little is padding; in a random order, because a part of the batches may be read alone.
    texts.sort(key=len)
    batches = [encoded(tokenizer, texts[start : start + 16]) for start in range(0, len(texts), 16)]
    drawing.shuffle(batches)
    return batches


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    measures = Measures(args.data, tokenizer)
    results = Results(args.out, {
        "model": Path(args.model).name, "arguments": {"samples": args.samples}, "environment": machine(),
    })  # fmt: skip

    def compressed(config: hc.CompressionConfig, batches: list[dict[str, Tensor]]) -> Callable[[], dict]:
        def compute() -> dict:
            model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
            start = time.perf_counter()
            hc.compress(model, config, data=batches)
            seconds = time.perf_counter() - start
            step = hc.steps_of(model)[-1]
            sizes = {name: step[name] for name in ("heads_per_layer", "neurons_per_layer") if name in step}
            cost = hc.count_cost(model, 32)
            return {**measures(model), "bytes": cost.bytes, "compress_seconds": round(seconds, 1), **sizes}

        return compute

    results.cell("dense", lambda: measures(AutoModel.from_pretrained(args.model, dtype=torch.float32)))
    for seed in args.seeds:
        batches = calibration(args.data, tokenizer, args.samples, seed)
        for fields in args.prune:
            # Budgets by divergence share what they measure.
            with shared_passes():
                for ratio in args.ratios:
                    config = hc.StructuredPruningConfig(mac_ratio=ratio, seed=seed, **fields)
                    results.cell(f"seed{seed}/prune {ratio}/{label_of(fields)}", compressed(config, batches))
        for fields in args.quantize:
            config = hc.WeightQuantizationConfig(**fields)
            results.cell(f"seed{seed}/quantize/{label_of(fields)}", compressed(config, batches))


if __name__ == "__main__":
    main()
