"""Trainings that stop in the middle."""

import contextlib

import pytest
from transformers import TrainerCallback


class Stop(TrainerCallback):
    """Writes a checkpoint after an update and ends the training."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def train_with_stops(trainer_of, folder, stops):
    """Train, stop after each of these updates, and resume from the checkpoint written there.

    `trainer_of(number, stop)` makes the trainer of each part with a `Stop`. The last one is returned, at its end.
    """
    for number, stop in enumerate([*stops, 0]):
        trainer = trainer_of(number, stop)
        checkpoint = str(folder / f"checkpoint-{stops[number - 1]}") if number else None
        with pytest.raises(InterruptedError) if stop else contextlib.nullcontext():
            trainer.train(checkpoint)
    return trainer
