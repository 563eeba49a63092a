"""What the parts of `device.py` share: models and texts, and measurements that are noted one by one."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging


SIZES = {
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "tiny": {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 128},
}  # fmt: skip


class Bench:
    """The measurements of one part.

    Args:
        device: cuda or cpu.
        tiny: Tiny models and few repeats.
        seconds: The time of the part.
        write: Stores the measurements after each one.
    """

    def __init__(self, device: str, tiny: bool, seconds: float, write: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.tiny, self._write = torch.device(device), tiny, write
        self._end = time.perf_counter() + seconds
        self.results: dict[str, Any] = {}
        transformers_logging.set_verbosity_error()
        torch.manual_seed(0)

    def left(self) -> float:
        return self._end - time.perf_counter()

    def entry(self, name: str, run: Callable[[], dict[str, Any]], needs: float = 5.0) -> None:
        """Measure one thing; what goes wrong is noted, and without `needs` seconds it is left out."""
        if self.left() < needs:
            self.results[name] = {"error": "no time left"}
        else:
            began = time.perf_counter()
            try:
                self.results[name] = run()
            except Exception:
                self.results[name] = {"error": traceback.format_exc()[-4000:]}
            self.results[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name}: {self.results[name].get('line', self.results[name].get('error'))}", flush=True)
        self._write(self.results)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def bert(self, size: str = "base") -> BertForSequenceClassification:
        """A classifier with random weights, made where it runs."""
        with self.device:
            return BertForSequenceClassification(BertConfig(**SIZES["tiny" if self.tiny else size]))

    @property
    def half(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def lengths(self, number: int) -> list[int]:
        """Lengths as of reviews and sentences: most near 50 tokens, some of several hundred."""
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(number, generator=generator) * 0.7 + math.log(50)).exp().clamp(8, 384)
        return sorted(int(length) for length in (drawn / 4 if self.tiny else drawn).clamp(min=4))

    def rows(self, number: int) -> Dataset:
        """Random tokens and labels; neighbours in length are neighbours."""
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(5, 500, (length,), generator=generator).tolist() for length in self.lengths(number)]
        return Dataset.from_dict({"input_ids": ids, "labels": [len(row) % 2 for row in ids]})

    def batches(self, number: int, size: int) -> list[dict[str, Tensor]]:
        rows = self.rows(number)
        padded = [collate([rows[i] for i in range(start, start + size)]) for start in range(0, number, size)]
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in padded]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}
