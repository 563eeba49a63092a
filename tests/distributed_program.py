"""Small trainings that run in one process or as a rank of two, and return everything that must agree."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import pad
from tests.two_processes import become_rank


BATCH = 4


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Models, projectors and sums of losses that are made in the block: rounding cannot hide a wrong gradient."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Read(TrainerCallback):
    """Collects the numbers of the rows that this process has trained on, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def collate(self, features: list[dict]) -> dict:
        self.batches.append([feature["number"] for feature in features])
        return pad(features)


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def rows(number: int, length: int | None = None, first: int = 0) -> list[dict]:
    """Rows of ids, ragged unless a length is given; the label says whether the first id is even."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(number):
        width = length or int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(5, 99, (width,), generator=generator)
        found.append({"input_ids": ids, "labels": int(ids[0] % 2), "number": first + index})
    return found


def as_two_read(found: list[dict]) -> list[dict]:
    """The rows of an epoch of two processes in one: their last batches are filled up from the beginning."""
    return found + found[: -len(found) % (2 * BATCH)]


def drawn_by_rank(seed: int) -> int:
    """Another seed in each process: a head that its process has drawn without a seed."""
    return seed + 10 * int(os.environ.get("RANK", "0"))


def model(seed: int, wide: bool = False, dropout: float = 0.0, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    width = 32 if wide else 16
    config = BertConfig(
        vocab_size=99, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _pruning(**options: Any) -> hc.WeightPruningCallback:
    timing = {"pruning_frequency": 2, "start_step": 1, "end_step": 3}
    return hc.WeightPruningCallback(hc.WeightPruningConfig(**{"target_sparsity": 0.5, **timing, **options}))


def saved_states(folder: Path) -> list[str]:
    """Three states of a teacher; processes that start together shall find them written."""
    places = [folder / f"saved_states-{seed}" for seed in (1, 2, 3)]
    for seed, place in enumerate(places, start=1):
        if not place.exists():
            model(seed, wide=True).save_pretrained(place)
    return [str(place) for place in places]


def pieces(kind: str, folder: Path, dropout: float, apart: bool) -> tuple[type, type, dict, dict, list]:
    """Trainer, arguments, its further fields, its models and the callbacks of a kind of training."""
    seeds = [drawn_by_rank(seed) if apart else seed for seed in (0, 1)]
    student, teacher = model(seeds[0], dropout=dropout), model(seeds[1], wide=True, dropout=dropout)
    both, maps = {"model": student, "teacher_model": teacher}, {"alpha_layer": 1.0}
    if kind == "stock":
        return Trainer, TrainingArguments, {}, {"model": student}, [_pruning(pattern="2:4")]
    if kind == "compression":
        return CompressionTrainer, TrainingArguments, {}, {"model": student}, [_pruning()]
    if kind == "distillation":
        return hc.DistillationTrainer, hc.DistillationArguments, maps, both, [_pruning(pattern="2:4")]
    if kind == "states alone":
        # Neither the head nor the pooler gets a gradient.
        alone = {"alpha_task": 0.0, "alpha_output": 0.0, "alpha_layer": 1.0}
        return hc.DistillationTrainer, hc.DistillationArguments, alone, both, []
    if kind == "half unguided":
        return hc.DistillationTrainer, hc.DistillationArguments, {**maps, "max_distill_steps": 3}, both, []
    if kind == "structured":
        hc.compress(student, hc.StructuredPruningConfig(mac_ratio=0.5), data=[pad(rows(8, 12))])
        return hc.DistillationTrainer, hc.DistillationArguments, maps, both, []
    if kind in ("tokens", "stock tokens"):
        hc.compress(student, hc.TokenPruningConfig(masking_mode="soft", temperature=1e-2, final_token_threshold=0.02))
        options = {} if kind == "stock tokens" else {"learning_rate": 1e-3}
        annealing = hc.ThresholdAnnealingCallback(2e-2, 1e-3, lambda_threshold=0.1, **options)
        if kind == "stock tokens":
            return Trainer, TrainingArguments, {}, {"model": student}, [annealing]
        return hc.DistillationTrainer, hc.DistillationArguments, {}, both, [annealing]
    if kind in ("joint", "joint in turns", "joint, parts unused"):
        if kind == "joint, parts unused":
            teacher.unused = torch.nn.Linear(2, 2)
        turns = {"teacher_update_cycle": 2, "teacher_schedule": "stretched"} if kind == "joint in turns" else {}
        fields = {**maps, "teacher_learning_rate": 3e-3, "save_teacher": False, **turns}
        return hc.JointTeacherTrainer, hc.JointTeacherArguments, fields, both, []
    if kind.startswith("proximal"):
        dual = (
            {"prox_mode": "dual", "dual_epsilon": 0.01, "dual_learning_rate": 0.5} if kind == "proximal, dual" else {}
        )
        fields = {"teacher_learning_rate": 3e-3, "save_teacher": False, "alpha_layer": 0.1, **dual}
        if kind == "proximal, both evaluated":
            fields["evaluate_teacher"] = True
        return hc.ProximalTrainer, hc.ProximalArguments, fields, both, []
    assert kind == "snapshots", kind
    fields = {**maps, "teacher_snapshots": saved_states(folder.parent)}
    return hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments, fields, {"model": student}, []


def trainer_of(
    kind: str,
    folder: str | Path,
    data: list[dict],
    read: Read | None = None,
    stream: bool = False,
    dropout: float = 0.0,
    apart: bool = False,
    eval_rows: list[dict] | None = None,
    **options: Any,
) -> Trainer:
    transformers.logging.set_verbosity_error()
    trainer_class, arguments, fields, models, callbacks = pieces(kind, Path(folder), dropout, apart)
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "save_strategy": "no",
        # The gradient of a key's bias is rounding alone, which Adam would blow up.
        "adam_epsilon": 1e-5,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "dataloader_pin_memory": False, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
        # Otherwise a stock `Trainer` multiplies the loss of a model like BERT by the number of processes.
        "average_tokens_across_devices": False,
    }  # fmt: skip
    read = read or Read()
    return trainer_class(
        **models, args=arguments(str(folder), **{**defaults, **fields, **options}),
        train_dataset=Stream(data) if stream else data, eval_dataset=eval_rows, data_collator=read.collate,
        callbacks=callbacks, compute_metrics=right_and_seen,
    )  # fmt: skip


def right_and_seen(found: Any) -> dict[str, float]:
    return {"right": float((found.predictions.argmax(-1) == found.label_ids).sum()), "rows": len(found.label_ids)}


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Student, projectors, a learning teacher, and the scores and masks of pruning."""
    unwrap = trainer.accelerator.unwrap_model
    found = dict(unwrap(trainer.model).state_dict())
    maps, teacher = getattr(trainer, "projectors", None), getattr(trainer, "teacher_model", None)
    found |= {f"map.{name}": value for name, value in (unwrap(maps).state_dict() if maps is not None else {}).items()}
    found |= {
        f"teacher.{name}": value for name, value in (teacher.state_dict() if teacher is not None else {}).items()
    }
    for name, parameter in unwrap(trainer.model).named_parameters():
        state = trainer.optimizer.state.get(parameter, {})
        found |= {f"{name} {key}": state[key] for key in ("prune_score", "pruned") if key in state}
    return copy.deepcopy({name: value.detach() for name, value in found.items()})


def logs_of(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged at each update, without times and speeds."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}
        for entry in trainer.state.log_history
    ]


def train(kind: str, folder: str, data: list[dict], resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train, and return logs, weights and the rows that were read."""
    read = Read()
    with double_precision():
        trainer = trainer_of(kind, folder, data, read, **options)
        loss = trainer.train(resume_from_checkpoint=resume).training_loss
    return {"logs": logs_of(trainer), "weights": weights_of(trainer), "batches": read.batches, "training_loss": loss}


def train_and_resume(kind: str, folder: str, data: list[dict], update: int, **options: Any) -> list[dict[str, Any]]:
    """The unbroken training, and one that goes on from its checkpoint after an update."""
    options |= {"save_strategy": "steps", "save_steps": update}
    whole = train(kind, folder, data, **options)
    return [whole, train(kind, folder, data, resume=f"{folder}/checkpoint-{update}", **options)]


def evaluate(kind: str, folder: str, data: list[dict], stream: bool = False) -> dict[str, float]:
    """The metrics of a trainer that has not trained."""
    with double_precision():
        trainer = trainer_of(kind, folder, data)
        found = trainer.evaluate(Stream(data) if stream else data)
    return {name: value for name, value in found.items() if not name.endswith(("_runtime", "_per_second", "_time"))}


def evaluate_and_train(kind: str, folder: str, data: list[dict], **options: Any) -> dict[str, Any]:
    """Train after an evaluation of the student, and of a teacher in a trainer of its own."""
    with double_precision():
        trainer = trainer_of(kind, folder, data, **options)
        trainer.evaluate(data[:8])
        if kind == "joint":
            Trainer(model=trainer.teacher_model, args=trainer.args, data_collator=pad).evaluate(data[:8])
        trainer.train()
    return {"logs": logs_of(trainer), "weights": weights_of(trainer)}


def fail(kind: str, folder: str, rank: int, port: int, how: str) -> None:
    """A training as one of two processes, in which rank 1 dies alone after two updates."""
    become_rank(rank, port)
    with open(f"{folder}/rank{rank}", "w") as said:
        os.dup2(said.fileno(), 2)

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if rank == 1 and state.global_step == 2:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("The disk of this machine is gone.")

    trainer = trainer_of(kind, f"{folder}/out", rows(20), num_train_epochs=50)
    trainer.add_callback(Die())
    trainer.train()


if __name__ == "__main__":
    fail("joint", sys.argv[1], int(os.environ["RANK"]), int(os.environ["MASTER_PORT"]), sys.argv[2])
