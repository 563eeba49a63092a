"""Timing takes turns, disturbs nothing, and says what it measured."""

import dataclasses
import json
import time

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_compress.report.latency import Latency, batches_by_length, measure_latency, speedups, unpadded_batches
from hf_compress.report.memory import TENSOR_MEMORY, peak_memory, resident_bytes


class Recorder(nn.Module):
    """Notes each call in a shared log and takes a fixed time."""

    def __init__(self, name, log, seconds=0.0):
        super().__init__()
        self.name, self.log, self.seconds = name, log, seconds
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids, attention_mask=None):
        entry = {"name": self.name, "first": int(input_ids[0, 0]), "training": self.training}
        self.log.append({**entry, "inference": torch.is_inference_mode_enabled(), "mask": attention_mask is not None})
        time.sleep(self.seconds)
        return input_ids * 2


def batch(first, size=2, length=3):
    ids = torch.full((size, length), first)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(size), "index": [1]}


def timing(name, totals, num_batches=2, num_examples=4):
    return Latency(
        name=name, batch_size=2, p50=0.0, p95=0.0, throughput=0.0, peak_memory=0, memory_kind="", threads=1,
        dtype="float32", attention="sdpa", device="cpu", num_batches=num_batches, num_examples=num_examples,
        repeats=len(totals), totals=tuple(totals),
    )  # fmt: skip


def test_models_take_turns_on_every_batch_and_everyone_takes_every_place():
    log = []
    models = {name: Recorder(name, log) for name in "abc"}
    measure_latency(models, [batch(0), batch(1)], repeats=3, warmup=0)
    timed = log[: 3 * 2 * 3]
    rounds = [timed[start : start + 3] for start in range(0, len(timed), 3)]
    # Each batch goes through all models before the next batch starts ...
    assert [[call["first"] for call in calls] for calls in rounds] == [[place % 2] * 3 for place in range(6)]
    # ... in rotating order, so that each model goes first, second and last equally often.
    assert ["".join(call["name"] for call in calls) for calls in rounds] == ["abc", "bca", "cab", "abc", "bca", "cab"]


def test_warmup_is_run_and_not_counted():
    log = []
    [timed] = measure_latency({"a": Recorder("a", log)}, [batch(0)], repeats=2, warmup=3)
    assert len(timed.totals) == timed.repeats == 2
    assert len(log) == 3 + 2 + 1  # the last call measures memory


def test_calls_are_without_gradients_in_eval_mode_and_labels_stay_out():
    log = []
    model = Recorder("a", log).train()
    measure_latency([model], [batch(0)], repeats=1, warmup=0)
    assert all(call["inference"] and not call["training"] and call["mask"] for call in log)


def test_modes_are_restored_even_after_an_error():
    class Broken(Recorder):
        def forward(self, input_ids):
            raise RuntimeError("broken on purpose")

    training, evaluating = Recorder("t", []).train(), Recorder("e", []).eval()
    # The same object under two names has one mode.
    measure_latency({"t": training, "e": evaluating, "again": training}, [batch(0)], repeats=1)
    assert training.training
    assert not evaluating.training
    broken = Broken("b", []).train()
    with pytest.raises(RuntimeError, match="on purpose"):
        measure_latency({"t": training, "b": broken}, [batch(0)], repeats=1)
    assert training.training
    assert broken.training


def test_numbers_follow_from_the_totals_of_repeats():
    log = []
    models = {"slow": Recorder("slow", log, 0.03), "fast": Recorder("fast", log, 0.01)}
    slow, fast = measure_latency(models, [batch(0, size=2), batch(1, size=4)], repeats=5, warmup=0)
    totals = torch.tensor(slow.totals, dtype=torch.float64)
    assert slow.p50 == pytest.approx(float(totals.median()) / 2)
    assert slow.p95 == pytest.approx(float(totals.quantile(0.95)) / 2)
    assert slow.throughput == pytest.approx(6 / float(totals.median()))
    assert (slow.batch_size, slow.num_batches, slow.num_examples, slow.repeats) == (4, 2, 6, 5)
    assert slow.p50 >= 0.03
    assert (slow.dtype, slow.device, slow.attention, slow.threads) == (
        "float32", "cpu", "unknown", torch.get_num_threads(),
    )  # fmt: skip
    assert slow.p50 > 1.5 * fast.p50
    assert speedups([slow, fast], "slow")["fast"].median > 1.5
    restored = Latency(**{**json.loads(json.dumps(slow.to_dict())), "totals": slow.totals})
    assert restored == slow


def test_attention_implementation_of_a_transformers_model(model, batches):
    bert = model("bert", "sequence_classification")
    bert.set_attn_implementation("eager")
    [timed] = measure_latency([bert], batches(bert.config, count=1, size=2), repeats=1, warmup=0)
    assert timed.attention == "eager"
    assert timed.name == "BertForSequenceClassification-0"


def test_precision_and_memory_are_the_models_own(model, batches):
    bert = model("bert").to(torch.float64)
    [timed] = measure_latency({"double": bert}, batches(bert.config, count=1, size=2), repeats=1, warmup=0)
    assert timed.dtype == "float64"
    assert timed.peak_memory > resident_bytes(bert)


def test_speedups_pair_the_rounds():
    # A load that doubles one round for both models changes no ratio.
    found = speedups([timing("dense", [2.0, 4.0, 3.0]), timing("small", [1.0, 2.0, 2.0])], "dense")
    assert dataclasses.astuple(found["small"]) == (2.0, 1.5, 2.0)
    assert dataclasses.astuple(found["dense"]) == (1.0, 1.0, 1.0)


def test_speedups_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match="baseline must be one of a, got 'b'"):
        speedups([timing("a", [1.0])], "b")
    with pytest.raises(ValueError, match="of one run with 1 repeats of 2 batches, got 2 of 2 for 'b'"):
        speedups([timing("a", [1.0]), timing("b", [1.0, 1.0])], "a")
    with pytest.raises(ValueError, match="of one run"):
        speedups([timing("a", [1.0]), timing("b", [1.0], num_examples=5)], "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches must hold at least one batch"),
        ({"models": {}}, "models must hold at least one model"),
        ({"models": nn.Linear(1, 1)}, "models must be a dict or a list of models, got one Linear"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"batches": [{"pixels": torch.zeros(1, 1)}]}, r"tensors that Recorder takes, got \['pixels'\]"),
    ],
)
def test_impossible_arguments_are_named(changes, message):
    arguments = {"models": {"a": Recorder("a", [])}, "batches": [batch(0)], "repeats": 1, "warmup": 0, **changes}
    with pytest.raises(ValueError, match=message):
        measure_latency(**arguments)


def test_peak_memory_is_the_largest_set_of_live_tensors():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 100, bias=False), nn.Linear(100, 4, bias=False)
            self.twin = self.wide

        def forward(self, rows):
            # A view and an in-place operation need nothing new.
            wide = self.wide(rows).relu_().view(-1, 100)
            narrow = self.narrow(wide)
            del wide
            return narrow + 1

    weights, rows = 8 * 100 + 100 * 4, torch.zeros(5, 8)
    assert resident_bytes(Chain()) == 4 * weights
    measured = [peak_memory(Chain(), {"rows": rows}) for _ in range(2)]
    assert measured == [(4 * (weights + 5 * 100 + 5 * 4), TENSOR_MEMORY)] * 2


def token_rows(lengths):
    return Dataset.from_dict(
        {
            "input_ids": [[7] * length for length in lengths],
            "attention_mask": [[1] * length for length in lengths],
            "labels": [0] * len(lengths),
        }
    )


def test_images_keep_their_order():
    images = Dataset.from_dict({"pixel_values": [[[float(i)]] for i in range(5)]})
    assert batches_by_length(images, 2) == [[0, 1], [2, 3], [4]]


def test_batches_of_one_have_no_padding_and_no_labels(tokenizer):
    found = unpadded_batches(token_rows([9, 3, 5]), tokenizer, 1)
    assert [b["input_ids"].shape for b in found] == [(1, 3), (1, 5), (1, 9)]
    assert all(set(b) == {"input_ids", "attention_mask"} for b in found)


def test_larger_batches_pad_to_their_own_longest(tokenizer):
    found = unpadded_batches(token_rows([9, 3, 5, 4, 8]), tokenizer, 2)
    assert [b["input_ids"].shape for b in found] == [(2, 4), (2, 8), (1, 9)]
    assert [b["attention_mask"].sum(1).tolist() for b in found] == [[3, 4], [5, 8], [9]]


def test_a_limit_keeps_whole_batches_spread_over_the_lengths(tokenizer):
    rows = token_rows([*range(2, 42)])
    assert [b["input_ids"].shape[1] for b in unpadded_batches(rows, tokenizer, 1, limit=4)] == [7, 17, 27, 37]
    in_fours = unpadded_batches(rows, tokenizer, 4, limit=8)
    assert [b["attention_mask"].sum(1).tolist() for b in in_fours] == [[10, 11, 12, 13], [30, 31, 32, 33]]
    assert len(unpadded_batches(rows, tokenizer, 4, limit=1000)) == 10


@pytest.mark.parametrize(
    ("lengths", "batch_size", "limit", "message"),
    [([3], 0, None, "batch_size must be at least 1, got 0"), ([3], 1, 0, "limit must be at least 1, got 0")],
)
def test_impossible_batches_are_named(tokenizer, lengths, batch_size, limit, message):
    with pytest.raises(ValueError, match=message):
        unpadded_batches(token_rows(lengths), tokenizer, batch_size, limit)


def test_no_rows_make_no_batches(tokenizer):
    with pytest.raises(ValueError, match="rows must hold at least one example"):
        unpadded_batches(token_rows([3]).select([]), tokenizer, 1)
