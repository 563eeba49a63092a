"""Interrupted runs with teachers end with the weights of the unbroken one, wherever they were stopped."""

import pytest
import torch

from tests.crash_program import Rows
from tests.guided_setup import dense, linear, same, trainer_of, weights
from tests.stopping import Stop, train_with_stops


# Seven rows twice: in each epoch some texts come a second time.
ROWS = [Rows()[index % 7 if index < 14 else index] for index in range(30)]
UPDATES = 8

# Eight micro-batches and four updates an epoch; three snapshots change after the updates 2 and 4.
MODES = {
    "joint": ("joint", {"alpha_output": 1.0, "warmup_steps": 3}),
    "joint, every second": ("joint", {"teacher_update_cycle": 2, "teacher_schedule": "stretched"}),
    "joint, until 4": ("joint", {"max_distill_steps": 4}),
    "published": ("joint", {"compat": "cald", "teacher_update_cycle": 2}),
    "snapshots": ("snapshots", {"teacher_dropout": True, "alpha_output": 1.0}),
    "snapshots, until 4": ("snapshots", {"teacher_dropout": True, "max_distill_steps": 4}),
    "fixed, until 4": ("fixed", {"teacher_dropout": True, "max_distill_steps": 4}),
    "cached": ("fixed", {"teacher_cache_dir": "cache", "alpha_output": 1.0}),
}
# At each border and behind it; then before, and again and again.
PATTERNS = [[2, 4, 5]]
MORE = [[1, 3, 5], [4, 5], [6, 7], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture
def linear_snapshots(tmp_path):
    """Snapshots whose modules are rebuilt from a record, with dropout."""
    for number in (1, 2, 3):
        linear(10 + number, 0.1).save_pretrained(tmp_path / "snapshots" / f"checkpoint-{number}")
    return [str(tmp_path / "snapshots" / "checkpoint-*")]


def ends(folder, mode, stops, snapshots):
    """The weights of student and teacher in the end, after a stop at each of these updates."""
    kind, options = MODES[mode]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
               "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 3, **options}  # fmt: skip
    if kind == "snapshots":
        options["teacher_snapshots"] = snapshots
    if "teacher_cache_dir" in options:
        options["teacher_cache_dir"] = str(folder / "cache")

    def part(number, stop):
        # A resumed run takes the student, and a learning teacher, from the checkpoint.
        given = None if kind == "snapshots" else dense(5 if kind == "joint" and number else 1, 0.1)
        trainer = trainer_of(kind, folder, linear(number, 0.1), given, **options)
        trainer.train_dataset = ROWS
        trainer.add_callback(Stop(stop))
        return trainer

    trainer = train_with_stops(part, folder, stops)
    assert trainer.state.global_step == UPDATES
    # Buffers tell what a model saw in training mode; a snapshot that is opened again saw less.
    return weights(trainer.model), {name: p.detach().clone() for name, p in trainer.teacher_model.named_parameters()}


@pytest.mark.parametrize("patterns", [PATTERNS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("mode", [
    mode if mode in ("joint", "snapshots", "cached") else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES
])  # fmt: skip
def test_interruptions_leave_no_trace(tmp_path, linear_snapshots, mode, patterns):
    whole = ends(tmp_path / "whole", mode, [], linear_snapshots)
    for stops in patterns:
        found = ends(tmp_path / "-".join(map(str, stops)), mode, stops, linear_snapshots)
        assert same(found[0], whole[0]), stops
        # What no longer guides need not be opened again.
        assert mode == "snapshots, until 4" or same(found[1], whole[1]), stops


def test_opening_a_snapshot_takes_no_random_numbers(tmp_path, linear_snapshots):
    """A resumed run opens one that the unbroken run opened earlier."""
    trainer = trainer_of("snapshots", tmp_path, linear(0), teacher_snapshots=linear_snapshots)
    trainer.session.teacher.set_length(3)
    before = torch.get_rng_state()
    for step in range(3):
        trainer.session.teacher.before_update(step)
    assert trainer.session.teacher.index == 2
    assert torch.equal(torch.get_rng_state(), before)
