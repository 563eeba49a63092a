"""A Trainer that saves whole folders and resumes exactly."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_compress.core.launcher import lost_process_named
from hf_compress.core.saving import complete_or_absent
from hf_compress.folder_card import write_card
from hf_compress.training.checkpoint_checks import (
    require_fitting_optimizer,
    require_fitting_weights,
    require_readable,
    saved_config,
)
from hf_compress.training.checkpoint_parts import CheckpointPart
from hf_compress.training.checkpoint_writer import CheckpointWriter, replace_pickled_arguments
from hf_compress.training.data_parallel import forget_evaluation_
from hf_compress.training.engines import check_engine
from hf_compress.training.epoch_order import EpochOrder
from hf_compress.training.outside_parameters import OutsideParameters
from hf_compress.training.publishing import PublishingTrainer
from hf_compress.training.saved_names import accept_saved_names_


logger = logging.getLogger(__name__)

Part = TypeVar("Part", EpochOrder, OutsideParameters)


class ResumableTrainer(PublishingTrainer):
    """A `Trainer` whose folders and checkpoints are whole or absent, and whose interrupted trainings go on exactly.

    What is trained, and with which loss, is `Trainer`'s; see `CompressionTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self)
        self.checkpoints = CheckpointWriter(self.args, lambda: self.accelerator.wait_for_everyone())
        self.add_callback(self.checkpoints)
        self._parts: list[CheckpointPart] = []
        self.add_part(EpochOrder())
        # The checkpoint from which the running training went on.
        self._resumed: Path | None = None

    def checkpoint_parts(self) -> Sequence[CheckpointPart]:
        """The state to save into every checkpoint besides the files that `Trainer` writes."""
        return list(self._parts)

    def add_part(self, part: Part) -> Part:
        """Add a callback whose state goes into every checkpoint."""
        self.add_callback(part)
        self._parts.append(part)
        return part

    def teacher_origins(self) -> dict[str, str]:
        """Name of each teacher -> the folder or the name on the Hub that it came from."""
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer; the directory is complete or does not load."""
        folder = output_dir or str(self.args.output_dir)
        if self.checkpoints.staging or not (self.args.should_save or self.is_fsdp_enabled):
            super().save_model(folder, _internal_call)
            if self.args.should_save:
                replace_pickled_arguments(folder, self.checkpoints.args)
            return
        # All processes take part where each holds a shard. `Trainer` saves nothing there with SHARDED_STATE_DICT.
        gathered = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            with complete_or_absent(folder) as staged:
                if gathered is None:
                    super().save_model(str(staged), _internal_call=True)
                else:
                    self._save(str(staged), state_dict=gathered)
                replace_pickled_arguments(staged, self.args)
                write_card(staged, self._core(), folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as `Trainer.train`, as the only training in `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint; or True for the last whole one of the training that ran in
                `output_dir` before, from the start if it has none. A training that does not resume is a new one:
                `True` never takes the checkpoints that an earlier one left in the same folder.
            trial: Of a hyperparameter search.
            args: As for `Trainer.train`, like kwargs.

        Raises:
            ValueError: If `output_dir` cannot be written or is used by a running training, holds the model or the
                teacher, or lies on a disk too small for the checkpoints; or if a checkpoint is damaged or of another
                number of processes.
            LostProcess: If another process of the training has ended.
        """
        # A search makes its models.
        origin = "" if self.model is None else getattr(self._core(), "name_or_path", "")
        folder = self._get_output_dir(trial)
        if self.args.world_size > 1 and not self.is_fsdp_enabled and self.model is not None:
            forget_evaluation_(self.model)
        with (
            lost_process_named(self.args.world_size),
            self.checkpoints.training(folder, resume_from_checkpoint, origin, self.teacher_origins()) as checkpoint,
        ):
            self._resumed = checkpoint
            if self.model_init is None:
                self.require_resumable(self._core())
            if checkpoint is None:
                return super().train(None, trial, *args, **kwargs)
            logger.info("Training continues from %s.", checkpoint)
            return super().train(str(checkpoint), trial, *args, **kwargs)

    def require_resumable(self, model: PreTrainedModel) -> None:
        """Refuse a checkpoint that is damaged, or of another model or kind of training.

        Args:
            model: The model that resumes, without wrappers.

        Raises:
            ValueError: Names the part that does not fit.
        """
        accept_saved_names_(model)
        if self._resumed is None:
            return
        config = saved_config(self._resumed)
        if config is not None:
            self.require_same_training(model.config, config)
        require_readable(self._resumed, self.args.process_index, self.args.world_size)
        if not self.is_fsdp_enabled:
            require_fitting_weights(self._resumed, model)

    def require_same_training(self, config: PretrainedConfig, saved: PretrainedConfig) -> None:
        """Raise `ValueError` when a checkpoint with the config `saved` is of another kind of training."""

    def begin_training(self, num_updates: int, updates_per_epoch: int) -> None:
        """Called before the optimizer is made, when the length of the training is known."""
        if self._resumed is not None:
            for part in self.checkpoint_parts():
                part.load(self._resumed, self.args.process_index)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.set_initial_training_values`, which counts the updates; then the training begins."""
        values = super().set_initial_training_values(*args, **kwargs)
        self.begin_training(num_updates=values[-1], updates_per_epoch=values[1])
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As `Trainer.create_scheduler`; a checkpoint of another optimizer is refused before it is read."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._resumed is not None and self.optimizer is not None and not self.is_fsdp_enabled:
            require_fitting_optimizer(self._resumed, self.optimizer)
        return scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private: `Trainer` has no public hook around the writing of a checkpoint. `on_save` comes afterwards, when a
        # crash would already have left half of one under its name.
        given, name = self.args, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.checkpoints.written(self.state) as folder:
            checkpoint = folder / name
            checkpoint.mkdir(parents=True, exist_ok=True)
            # First: the state that `Trainer` writes last marks a checkpoint as whole.
            for part in () if given.save_only_model else self.checkpoint_parts():
                part.save(checkpoint, given.process_index, given.should_save)
            try:
                # A copy: `Trainer` writes below `output_dir`, and would upload what is not whole yet.
                self.args = copy.copy(given)
                self.args.output_dir, self.args.push_to_hub = str(folder), False
                super()._save_checkpoint(model, None)
            finally:
                self.args = given
        if given.push_to_hub:
            self.upload_checkpoint(os.path.join(self.checkpoints.folder, name))
