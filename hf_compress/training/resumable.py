"""A Trainer that saves whole folders and resumes exactly."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from hf_compress.core.architectures import base_of
from hf_compress.core.saving import complete_or_absent
from hf_compress.core.weight_files import require_fit
from hf_compress.folder_card import FILE as CARD
from hf_compress.folder_card import add_compression, may_be_replaced, write_card
from hf_compress.training.checkpoint_writer import CheckpointWriter, replace_pickled_arguments
from hf_compress.training.checkpoints import readable, require_complete
from hf_compress.training.gaps import EpochOrder


logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A `Trainer` whose folders and checkpoints are whole or absent, and whose interrupted trainings go on exactly.

    What is trained, and with which loss, is `Trainer`'s; see `CompressionTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints = CheckpointWriter(self.args, lambda: self.accelerator.wait_for_everyone())
        self.add_callback(self._checkpoints)
        self._epoch_order = EpochOrder()
        self.add_callback(self._epoch_order)

    def _core(self) -> PreTrainedModel:
        return base_of(self.accelerator.unwrap_model(self.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer; the directory is complete or does not load."""
        folder = output_dir or self.args.output_dir
        aside = self._checkpoints.staging or not self.args.should_save
        if aside or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super().save_model(folder, _internal_call)
            if self.args.should_save:
                replace_pickled_arguments(folder, self.args)
            return
        with complete_or_absent(folder) as staged:
            super().save_model(str(staged), _internal_call=True)
            replace_pickled_arguments(staged, self.args)
            write_card(staged, self._core(), folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with what was done to the model; a README.md of somebody else stays."""
        file = Path(self.args.output_dir, CARD)
        if not self.is_world_process_zero() or not may_be_replaced(file):
            return
        super().create_model_card(*args, **kwargs)
        add_compression(file, self._core())

    def _teacher_sources(self) -> dict[str, str]:
        """Name of each teacher -> the folder or the name on the Hub that it came from."""
        return {}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as `Trainer.train`, as the only training in `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint; or True for the last whole one of the training that ran in
                `output_dir` before, from the start if it has none. A training that does not resume is a new one:
                `True` never takes the checkpoints that an earlier one left in the same folder.
            trial: Of a hyperparameter search.
            args: As for `Trainer.train`, like kwargs.

        Raises:
            ValueError: If `output_dir` cannot be written or is used by a running training, holds the model or the
                teacher, or lies on a disk too small for the checkpoints; or if a checkpoint is damaged.
        """
        # A search makes its models.
        source = "" if self.model is None else getattr(self._core(), "name_or_path", "")
        teachers = self._teacher_sources()
        folder = self._get_output_dir(trial)
        with self._checkpoints.training(folder, resume_from_checkpoint, source, teachers) as checkpoint:
            self._epoch_order.resumed = checkpoint
            if checkpoint is not None:
                logger.info("Training continues from %s.", checkpoint)
            return self._train_from(None if checkpoint is None else str(checkpoint), trial, *args, **kwargs)

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """The training itself, from the start or from a checkpoint, in a folder of its own."""
        return super().train(checkpoint, *args, **kwargs)

    def _check_checkpoint(self, config: PretrainedConfig) -> None:
        """Raise `ValueError` when a checkpoint with this config is of another kind of training."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # Checkpoints of adapters have no config of the model.
        if os.path.isfile(os.path.join(resume_from_checkpoint, CONFIG_NAME)):
            with readable(resume_from_checkpoint, CONFIG_NAME):
                config = AutoConfig.from_pretrained(resume_from_checkpoint)
            self._check_checkpoint(config)
        require_complete(Path(resume_from_checkpoint), self.args.world_size)
        with readable(resume_from_checkpoint, "weights"):
            core = self._core()
            whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            files = Path(resume_from_checkpoint).glob("model*.safetensors") if whole else ()
            require_fit(files, core.state_dict(keep_vars=True), getattr(core, "base_model_prefix", ""))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "optimizer and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "loss scale"):
            super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._epoch_order.save(output_dir, self.args)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint, "random numbers"):
            super()._load_rng_state(checkpoint)
        self._epoch_order.on_rng_restored()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super().get_batch_samples(*args, **kwargs)
        self._epoch_order.on_batches()
        return samples

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        root = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # Their engines lay out the folder; in transformers' own order the state file is last.
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._checkpoints.sign(Path(root, name))
            return
        with self._checkpoints.written_aside(root, self.state):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(root, name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` calls this while the checkpoint is written aside.
        if not self._checkpoints.staging:
            super()._push_from_checkpoint(checkpoint_folder)
