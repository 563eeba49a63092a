"""Trainings that stop in the middle."""

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
