"""Every trainer and callback as two processes on gloo: what one process computes, and the same bits in both."""

import inspect

import pytest
import torch
from transformers import Trainer

from tests import distributed_program as program
from tests.rounding import assert_equal_to_rounding


KINDS = (
    "compression", "distillation", "states alone", "half unguided", "structured", "tokens", "joint", "joint in turns",
    "joint, parts unused", "snapshots", "proximal", "proximal, dual",
)  # fmt: skip


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_agree(found, expected):
    """Both ranks have the same bits; their weights and logs are those of one process."""
    first, second = found
    assert_same_bits(first["weights"], second["weights"])
    assert first["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        if value.is_floating_point():
            assert_equal_to_rounding(first["weights"][name], value)
        else:
            assert torch.equal(first["weights"][name], value), name
    assert len(first["logs"]) == len(expected["logs"])
    for ours, theirs in zip(first["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(tmp_path, pair, kind):
    """20 ragged rows: the last batches are filled up, and the last window of an epoch is short."""
    data = program.rows(20)
    # Written before two processes look for them.
    program.saved_states(tmp_path)
    found = pair.run(program.train, kind, str(tmp_path / "two"), data)
    one = program.train(kind, str(tmp_path / "one"), program.as_two_read(data), gradient_accumulation_steps=4)
    assert_agree(found, one)
    assert len(one["logs"]) == 5
    assert [each["training_loss"] for each in found] == pytest.approx([one["training_loss"]] * 2, rel=1e-5)
    ours = [batch for pairs in zip(found[0]["batches"], found[1]["batches"], strict=True) for batch in pairs]
    assert ours == one["batches"]


@pytest.mark.parametrize("kind", ["stock", "stock tokens", "compression", "distillation"])
def test_two_processes_train_as_one_with_the_batch_of_both(tmp_path, pair, kind):
    """Rows of one length in the order that `Trainer` draws; those of a stock `Trainer` count alike only there."""
    data = program.rows(24, 8)
    # The last two updates are in no entry of the log but the last one, that of the whole training.
    options = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 1, "logging_steps": 4}
    found = pair.run(program.train, kind, str(tmp_path / "two"), data, **options)
    one = program.train(kind, str(tmp_path / "one"), data, per_device_train_batch_size=2 * program.BATCH, **options)
    if kind.startswith("stock"):
        # There it is a mean over the rows of each process.
        for each in (*found, one):
            del each["logs"][-1]["train_loss"]
    assert_agree(found, one)
    assert len(one["logs"]) == 2


@pytest.mark.skipif(
    "map_location = self.args.device if" in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers reads optimizers of several processes to a device cpu:0, which torch does not know",
)
@pytest.mark.parametrize(
    "kind",
    [
        "distillation", "tokens", "joint", "proximal, dual",
        # A part of what the others are.
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("compression", "snapshots", "stock")),
    ],
)  # fmt: skip
def test_resumed_processes_end_with_the_bits_of_unbroken_ones(tmp_path, pair, kind):
    """Ragged rows grouped by length, dropout, two windows of two batches an epoch, stopped in the middle of one."""
    data = program.rows(28)
    program.saved_states(tmp_path)
    # A stock `Trainer` draws another order for such groups when it resumes.
    order = "random" if kind == "stock" else "group_by_length"
    options = {"dropout": 0.1, "train_sampling_strategy": order, "num_train_epochs": 3}
    found = pair.run(program.train_and_resume, kind, str(tmp_path / "two"), data, update=3, **options)
    (whole, resumed), other = found[0], found[1]
    assert_same_bits(whole["weights"], other[0]["weights"])
    assert_same_bits(resumed["weights"], other[1]["weights"])
    assert_same_bits(whole["weights"], resumed["weights"])
    assert resumed["logs"][:-1] == whole["logs"][:-1]
    # Grouped by length, each row is still read in every epoch.
    for epoch in range(3):
        read = [
            row for each in (whole, other[0]) for batch in each["batches"][4 * epoch : 4 * epoch + 4] for row in batch
        ]
        assert set(read) == set(range(28))
        assert len(read) == 32


@pytest.mark.parametrize("kind", [pytest.param("distillation", marks=pytest.mark.slow), "joint"])
def test_workers_change_no_bit(tmp_path, pair, kind):
    data = program.rows(20)
    alone, _ = pair.run(program.train, kind, str(tmp_path / "alone"), data, dropout=0.1)
    with_workers, other = pair.run(
        program.train, kind, str(tmp_path / "workers"), data, dropout=0.1, dataloader_num_workers=2
    )
    assert_same_bits(alone["weights"], with_workers["weights"])
    assert_same_bits(alone["weights"], other["weights"])


@pytest.mark.parametrize("kind", ["distillation", "joint"])
def test_two_processes_read_a_stream_as_one(tmp_path, pair, kind):
    """Its last batch is shared out: two rows for each process."""
    data, options = program.rows(20, 8), {"stream": True, "max_steps": 5}
    found = pair.run(program.train, kind, str(tmp_path / "two"), data, **options)
    one = program.train(kind, str(tmp_path / "one"), data, per_device_train_batch_size=2 * program.BATCH, **options)
    assert_agree(found, one)


@pytest.mark.parametrize("kind", ["compression", "joint"])
def test_what_each_process_has_drawn_for_itself_becomes_that_of_the_first(tmp_path, pair, kind):
    data = program.rows(20)
    found = pair.run(program.train, kind, str(tmp_path / "apart"), data, apart=True)
    expected, _ = pair.run(program.train, kind, str(tmp_path / "alike"), data)
    assert_same_bits(found[0]["weights"], found[1]["weights"])
    assert_same_bits(found[0]["weights"], expected["weights"])


@pytest.mark.parametrize("kind", [pytest.param("compression", marks=pytest.mark.slow), "distillation", "joint"])
def test_processes_train_together_after_an_evaluation(tmp_path, pair, kind):
    """accelerate does not wrap a model that was prepared for an evaluation: each process would train its own."""
    data = program.rows(20)
    found = pair.run(program.evaluate_and_train, kind, str(tmp_path / "evaluated"), data)
    expected, _ = pair.run(program.train, kind, str(tmp_path / "fresh"), data)
    assert_same_bits(found[0]["weights"], found[1]["weights"])
    assert_same_bits(found[0]["weights"], expected["weights"])


@pytest.mark.parametrize("number", [11, 1])
@pytest.mark.parametrize("kind", ["compression", "distillation", "tokens", "proximal, both evaluated"])
def test_an_evaluation_counts_each_row_once(tmp_path, pair, kind, number):
    """Of 11 rows the last batches hold 3 and are filled up to 8; of 1 row the second process has none to count."""
    data = program.rows(number)
    found = pair.run(program.evaluate, kind, str(tmp_path / "two"), data)
    one = program.evaluate(kind, str(tmp_path / "one"), data)
    assert one["eval_rows"] == number
    for each in found:
        assert each == pytest.approx(one, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("number", [11, 1])
@pytest.mark.parametrize("kind", ["joint", "proximal, both evaluated"])
def test_an_evaluation_within_a_training_counts_each_row_once(tmp_path, pair, kind, number):
    """A learning teacher is wrapped there: each process must run it equally often."""
    data = program.rows(8)
    options = {"eval_rows": program.rows(number), "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 1}
    found = pair.run(program.train, kind, str(tmp_path / "two"), data, gradient_accumulation_steps=1, **options)
    one = program.train(kind, str(tmp_path / "one"), data, **options)
    assert any(entry.get("eval_rows") == number for entry in one["logs"])
    assert_agree(found, one)


def test_an_evaluation_counts_each_row_of_a_stream_once(tmp_path, pair):
    data = program.rows(11, 8)
    found = pair.run(program.evaluate, "distillation", str(tmp_path / "two"), data, stream=True)
    one = program.evaluate("distillation", str(tmp_path / "one"), data, stream=True)
    assert one["eval_rows"] == 11
    for each in found:
        assert each == pytest.approx(one, rel=1e-5, abs=2e-6)
