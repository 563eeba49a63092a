"""What runs that share a teacher's cache do, round after round: train live, then with a cold cache of that round.

As two programs with one folder they meet before each round; under torchrun they are the ranks of one job.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.utils.data import IterableDataset

import hf_compress as hc
from tests.crash_program import Rows, build, pad
from tests.two_processes import become_rank


def teacher():
    return build(16, 2, 1).eval()


def train(folder: Path, seed: int, cache: str | None) -> dict[str, torch.Tensor]:
    args = hc.DistillationArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3, alpha_layer=1.0,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=seed, logging_strategy="no",
        teacher_cache_dir=cache, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = hc.DistillationTrainer(
        model=build(16, 1, 0), teacher_model=teacher(), args=args, train_dataset=Rows(), data_collator=pad
    )
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


class Stream(IterableDataset):
    """The same rows, one after the other."""

    def __iter__(self):
        yield from (Rows()[index] for index in range(64))


def train_as(folder: str, name: str, rank: int, count: int, port: int, stream: bool, cache: str | None) -> None:
    """One of `count` processes of a training; writes its weights and how often its teacher ran in each epoch."""
    become_rank(rank, port, count)
    transformers.logging.set_verbosity_error()
    args = hc.DistillationArguments(
        f"{folder}/{name}", max_steps=16, per_device_train_batch_size=8 // count, learning_rate=1e-3, alpha_layer=1.0,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no",
        teacher_cache_dir=cache, dataloader_pin_memory=False, dataloader_num_workers=0 if stream else 2,
        # Batches of different lengths cannot be joined and split again.
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    speaker, epochs = teacher(), []
    trainer = hc.DistillationTrainer(
        model=build(16, 1, 0), teacher_model=speaker, args=args, train_dataset=Stream() if stream else Rows(),
        data_collator=pad,
    )  # fmt: skip
    speaker.register_forward_hook(lambda *_: epochs.append(trainer.state.global_step // 8))
    trainer.train()
    weights = {
        key: value.clone() for key, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    torch.save({"weights": weights, "teacher ran": epochs}, f"{folder}/{name}-{rank}.pt")


def meet(folder: Path, name: str, number: int) -> None:
    (folder / f"{name}-{number}").touch()
    while len(list(folder.glob(f"*-{number}"))) < 2:
        time.sleep(0.001)


def main(folder: str, name: str, rounds: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    together = "WORLD_SIZE" in os.environ
    out = Path(folder)
    # Two runs shuffle differently; two ranks share one order.
    seed = 3 if together else int(name)
    live = train(out / f"run-{name}", seed, None)
    for number in range(int(rounds)):
        if not together:
            meet(out, name, number)
        for weights in (train(out / f"run-{name}", seed, str(out / f"cache{number}")) for _ in range(2)):
            for key, value in live.items():
                torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
