"""What each process of a data-parallel training runs: prune, then write weights, masks and scores."""

import os
import sys
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments

import hf_compress as hc
from tests import crash_program


def main(folder: str, resume: str) -> None:
    transformers.logging.set_verbosity_error()
    out = Path(folder)
    args = TrainingArguments(
        str(out / "checkpoints"), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no",
    )  # fmt: skip
    config = hc.WeightPruningConfig(target_sparsity=0.8, pruning_frequency=2, start_step=1, end_step=7)
    trainer = Trainer(
        model=crash_program.build(16, 2, 0),
        args=args,
        train_dataset=crash_program.Rows(),
        data_collator=crash_program.pad,
        callbacks=[hc.WeightPruningCallback(config)],
    )
    assert args.world_size == 2
    trainer.train(resume_from_checkpoint=resume or None)
    found = dict(trainer.model.state_dict())
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        found.update({f"{name} {key}": state[key] for key in ("prune_score", "pruned") if key in state})
    torch.save(found, out / f"rank{os.environ['RANK']}{'-resumed' if resume else ''}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
