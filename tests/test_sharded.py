"""FSDP2 in two processes on gloo: what one process computes, saved whole, and resumed."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests import sharded_program as program
from tests.rounding import assert_equal_to_rounding
from tests.support_matrix import MATRIX
from tests.support_rows import ROWS, train
from tests.two_processes import TwoProcesses


REFUSALS = {
    "`JointTeacherTrainer`": "A learning teacher must run without fsdp",
    "`ProximalTrainer`": "A learning teacher must run without fsdp",
    "`WeightPruningCallback`, stock `Trainer`": "Weight pruning in training must see whole weights",
}


# The rows that differ most: maps beside the model, thresholds that are clipped apart, a teacher that is refused.
QUICK = (
    "`DistillationTrainer`",
    "`JointTeacherTrainer`",
    "`ThresholdAnnealingCallback`, `StageSwitchCallback`",
)


@pytest.fixture(scope="module")
def shards():
    processes = TwoProcesses()
    yield processes
    processes.close()


def trained_in_shards(shards, row, folder, **changes):
    """What both processes found alike; what they read is written before two of them look for it."""
    for attempt in ("first", "second"):
        place = folder / attempt
        ROWS[row](place)
        try:
            first, second = shards.run(program.in_shards, row, str(place), **changes)
            break
        except (EOFError, OSError):
            # A thread of gloo may end its process with a segmentation fault in malloc; wrong numbers end no process.
            shards.close()
            if attempt == "second":
                raise
    assert first.keys() == second.keys()
    for name, value in first.get("weights", {}).items():
        assert torch.equal(value, second["weights"][name]), name
    return first, place


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row in QUICK else pytest.mark.slow) for row in ROWS])
def test_two_processes_hold_one_model(shards, tmp_path, row):
    found, place = trained_in_shards(shards, row, tmp_path)
    if MATRIX[row]["FSDP2"] == "refused":
        assert found["refused"].startswith(REFUSALS[row])
        assert found["updates"] == 0
        return
    assert found["sharded"]
    expected = train(row, tmp_path / "one")
    assert found["weights"].keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert_equal_to_rounding(found["weights"][name].float(), value.float())
        assert torch.equal(found["resumed"][name], found["weights"][name]), name
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-5)
    saved = place / "saved"
    for name, value in AutoModelForSequenceClassification.from_pretrained(saved).state_dict().items():
        assert torch.equal(value, found["weights"][name]), name
    assert (saved / "README.md").is_file()


@pytest.mark.slow
def test_parts_of_a_checkpoint_are_saved_whole_in_the_end(shards, tmp_path):
    """`Trainer.save_model` writes no weights at all with this kind of checkpoint."""
    config = {**program.CONFIG, "state_dict_type": "SHARDED_STATE_DICT"}
    found, place = trained_in_shards(shards, "`CompressionTrainer`", tmp_path, fsdp_config=config)
    saved = AutoModelForSequenceClassification.from_pretrained(place / "saved").state_dict()
    for name, value in saved.items():
        assert torch.equal(value, found["weights"][name]), name
        assert torch.equal(found["resumed"][name], value), name


def test_the_first_form_of_fsdp_is_refused(shards, tmp_path):
    """It flattens weights, which methods look for by their names."""
    row = "`CompressionTrainer`"
    ROWS[row](tmp_path)
    for found in shards.run(
        program.in_shards, row, str(tmp_path), fsdp_config={"version": 1, "sync_module_states": False}
    ):
        assert found["refused"].startswith("fsdp must be FSDP2, got version 1")
        assert found["updates"] == 0
