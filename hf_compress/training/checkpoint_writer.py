"""Writing the checkpoints of a training: each is renamed when it is whole, and the oldest are removed."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from hf_compress.core.saving import disk_errors_explained, require_own_folder, sole_training, write_json
from hf_compress.training.checkpoints import RUN_FILE, binary_files, checkpoints_of, last_whole_checkpoint, run_note


logger = logging.getLogger(__name__)

# Not the name of a checkpoint: `Trainer` neither rotates nor resumes from what is below it.
_STAGING = ".incomplete"


def replace_pickled_arguments(folder: str | os.PathLike[str], args: TrainingArguments) -> None:
    """Keep a training's arguments beside a model as JSON instead of `Trainer`'s pickle, which is code when read."""
    pickled = Path(folder, TRAINING_ARGS_NAME)
    if pickled.exists():
        pickled.with_suffix(".json").write_text(str(cast(Any, args).to_json_string()) + "\n")
        pickled.unlink()


def _remove(checkpoint: Path, staging: Path) -> None:
    """Delete a checkpoint so that a crash in between leaves nothing under its name."""
    staging.mkdir(exist_ok=True)
    aside = staging / f"removed-{checkpoint.name}"
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


class CheckpointWriter(TrainerCallback):
    """Puts the checkpoints of a training into its output folder, each in one step.

    Args:
        args: The training's arguments.
        wait: Returns when all processes have called it.
    """

    def __init__(self, args: TrainingArguments, wait: Callable[[], None]) -> None:
        self.args = args
        self.wait = wait
        # Where `Trainer` shall write while a checkpoint is incomplete.
        self.staging: Path | None = None
        self.folder = Path(str(args.output_dir))
        self.run = ""
        self._begins_at: Path | None = None
        self._goes_on = False

    @contextmanager
    def training(
        self,
        folder: str | os.PathLike[str],
        resume: str | os.PathLike[str] | bool | None,
        model: str,
        teachers: Mapping[str, str],
    ) -> Iterator[Path | None]:
        """Own a folder while a training runs; gives the checkpoint that it goes on from, or None.

        Args:
            folder: Where the checkpoints of this training go.
            resume: A checkpoint, True for the last one of the training that ran in the folder, or None.
            model: The folder or the Hub name that the model came from.
            teachers: Name of each teacher -> where it came from.

        Raises:
            ValueError: If the folder cannot be written, or is that of an input or of another running training.
        """
        self.folder = Path(folder)
        if self.args.should_save:
            # A resumed training may have read its model from its own folder.
            require_own_folder(folder, teachers if resume else {"the model": model, **teachers})
            own = {str(path.resolve()) for path in checkpoints_of(folder)}
            for name, origin in teachers.items():
                if str(Path(origin).resolve()) in own:
                    raise ValueError(
                        f"output_dir {str(folder)!r} holds {name} ({origin}): this training would remove it as one of "
                        "its old checkpoints. Name another folder."
                    )
        with sole_training(folder) if self.args.should_save else nullcontext():
            last = last_whole_checkpoint(folder, self.args.world_size) if resume else None
            checkpoint = last if resume is True else Path(resume) if resume else None
            self._begins_at = checkpoint
            self._goes_on = last is not None and checkpoint is not None and last.resolve() == checkpoint.resolve()
            yield checkpoint

    def _begin_run(self) -> None:
        root, checkpoint, earlier = self.folder, self._begins_at, checkpoints_of(self.folder)
        shutil.rmtree(root / _STAGING, ignore_errors=True)
        known = None
        if self._goes_on and checkpoint is not None:
            known = run_note(root).get("run") or run_note(checkpoint).get("run")
        self.run = known or secrets.token_hex(8)
        if earlier and not self._goes_on:
            logger.warning(
                "%s holds checkpoints of an earlier training (%s). resume_from_checkpoint=True will no longer resume "
                "from them, and save_total_limit counts them.", root, ", ".join(path.name for path in earlier),
            )  # fmt: skip
        # Where all checkpoints are of one run, it needs no name.
        if known is None and (checkpoint is not None or earlier or (root / RUN_FILE).exists()):
            origin = os.path.relpath(checkpoint, root) if checkpoint is not None else None
            write_json(root / RUN_FILE, {"run": self.run, "resumed_from": origin})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a training whose checkpoints the disk cannot hold."""
        self.run = ""
        if not args.should_save:
            return
        number, present = self._checkpoints_to_write(state), len(checkpoints_of(self.folder))
        if args.save_total_limit and args.save_total_limit > 0:
            # A new one is written before an old one is removed.
            number = min(number, max(1, args.save_total_limit + 1 - present))
        needed = number * _smallest_size(args, model, kwargs.get("optimizer"))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"output_dir {str(self.folder)!r} is on a disk with {free / 1e9:.3g} GB free, and the {number} "
                f"checkpoints of this training need at least {needed / 1e9:.3g} GB. Lower save_total_limit, raise "
                "save_steps, or name a folder on a larger disk."
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The first step: nothing can be refused any more, and the folder belongs to this run."""
        if args.should_save and not self.run:
            self._begin_run()

    def _checkpoints_to_write(self, state: TrainerState) -> int:
        strategy, begun, end = self.args.save_strategy, state.global_step, state.max_steps
        if strategy in (SaveStrategy.STEPS, IntervalStrategy.STEPS):
            return math.ceil(end / state.save_steps) - begun // state.save_steps if begun < end else 0
        if strategy in (SaveStrategy.EPOCH, IntervalStrategy.EPOCH):
            return max(0, math.ceil(state.num_train_epochs) - int(state.epoch or 0))
        return int(strategy == SaveStrategy.BEST and begun < end)

    @contextmanager
    def written(self, state: TrainerState) -> Iterator[Path]:
        """Give the folder into which the block writes a checkpoint; afterwards it is complete in `self.folder`.

        All processes of the training enter and leave together.

        Args:
            state: The training's state. Its best checkpoint is given the name that it has in the end.

        Raises:
            ValueError: If the disk is full or the folder cannot be written.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        root, staging = self.folder, self.folder / _STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.wait()
        try:
            with disk_errors_explained(root):
                root.mkdir(parents=True, exist_ok=True)
                self.staging = staging
                yield staging
                self.staging = None
                best = root / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
                # `Trainer` looks for the best checkpoint beside the one it writes, and so finds no other.
                if best.name == name or best.is_dir():
                    state.best_model_checkpoint = str(best)
                self.wait()
                if self.args.should_save:
                    self._publish(staging / name, state)
                self.wait()
                if self.args.local_process_index == 0 and (staging / name).is_dir():
                    # The random states of a machine with a disk of its own.
                    shutil.rmtree(root / name, ignore_errors=True)
                    os.replace(staging / name, root / name)
        finally:
            self.staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _sign(self, checkpoint: Path) -> None:
        """Note in a complete checkpoint which run wrote it and which files belong to it."""
        note = {"run": self.run, "processes": self.args.world_size, "files": binary_files(checkpoint)}
        write_json(checkpoint / RUN_FILE, note)

    def _publish(self, written: Path, state: TrainerState) -> None:
        """Move a checkpoint to its name and remove the oldest."""
        state.save_to_json(str(written / TRAINER_STATE_NAME))
        self._sign(written)
        root = self.folder
        final = root / written.name
        if final.exists():
            _remove(final, written.parent)
        os.replace(written, final)
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        spared = {final.name, Path(state.best_model_checkpoint or final).name}
        # By age, as in `Trainer`: earlier runs first, then by step. Its own function goes by the folders' times, and
        # by step alone where all are written within a second; it also takes `checkpoint-best` for one of its own.
        kept = sorted(checkpoints_of(root), key=lambda path: run_note(path).get("run") == self.run)
        removable = [path for path in kept if path.name not in spared]
        for path in removable[: max(0, len(kept) - max(limit, len(spared)))]:
            _remove(path, written.parent)


def _smallest_size(args: TrainingArguments, model: torch.nn.Module, optimizer: Any) -> int:
    """The least number of bytes of a checkpoint: the weights, and two moments of each that Adam trains."""
    parameters = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    # A model with adapters is saved without its own weights.
    adapters = hasattr(model, "peft_config")
    weights = trained if adapters else sum(p.numel() * p.element_size() for p in parameters)
    adam = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam | torch.optim.AdamW)
    return weights + (2 * trained if adam and not args.save_only_model else 0)
