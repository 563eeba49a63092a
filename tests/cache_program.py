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

import hf_compress as hc
from tests.crash_program import Rows, build, pad


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
