"""What a step of `DistillationTrainer` costs beyond the arithmetic: against a loop written by hand.

    python benchmarks/training_overhead.py --model MODEL --data_dir DATA/sst2_sentences --out benchmarks/results/x.json

The student is the model pruned to half its multiply-accumulates, the teacher the model itself. Five ratios:
`output` and `layer`: trainer step / (student step + teacher forward by hand); `output_cached` and `layer_cached`:
trainer step with all of the teacher's outputs on disk / student step alone by hand; `joint`: step of
`JointTeacherTrainer` with hidden states / (student step + teacher step by hand). Hand and trainer alternate in
blocks of steps on the same batches, in one run; a ratio is the median over the blocks.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from datasets import Dataset
from header import arguments_of, commit, machine
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.stages.models import freeze_embeddings_, open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.inputs import calibration_batches
from hf_compress.tasks.sources import DataArguments, load_task


TEMPERATURE, LEARNING_RATE, CLIP = 2.0, 5e-5, 1.0
MODES = ("output", "layer", "output_cached", "layer_cached", "joint")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20, help="Different batches; they are used again and again.")
    parser.add_argument("--block", type=int, default=4, help="Steps before the other side takes its turn.")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--mac_ratio", type=float, default=0.5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--freeze_embeddings", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    return parser.parse_args()


def layer_loss(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """What a careful person would write: mean square over width, live positions, examples and layers."""
    mask = mask.float()
    per_layer = [
        (((s - t) ** 2).mean(-1) * mask).sum(1) / mask.sum(1) for t, s in zip(teacher[1:], student[1:], strict=True)
    ]
    return torch.stack(per_layer).mean()


class HandLoop:
    """The same training as the trainer's, as directly as it can be written."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, mode: str) -> None:
        self.student, self.teacher, self.with_layers = student.train(), teacher, mode in ("layer", "joint")
        self.learner = None
        if mode == "joint":
            self.learner = torch.optim.AdamW(teacher.train().parameters(), lr=LEARNING_RATE, fused=True)
        trained = [p for p in student.parameters() if p.requires_grad]
        self.parameters = trained
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.losses: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        outputs = self.student(**batch, output_hidden_states=self.with_layers)
        loss = outputs.loss
        if self.teacher is not None:
            targets = self.ask_teacher(batch)
            if self.with_layers:
                hidden = tuple(state.detach() for state in targets.hidden_states)
                loss = loss + layer_loss(hidden, outputs.hidden_states, batch["attention_mask"])
            else:
                log_p = F.log_softmax(targets.logits / TEMPERATURE, -1)
                log_q = F.log_softmax(outputs.logits / TEMPERATURE, -1)
                loss = loss + TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def ask_teacher(self, batch: dict[str, Tensor]):
        if self.learner is not None:
            targets = self.teacher(**batch, output_hidden_states=True)
            targets.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.teacher.parameters(), CLIP)
            self.learner.step()
            self.learner.zero_grad()
            return targets
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            return self.teacher(**inputs, output_hidden_states=self.with_layers)


class Alternate(TrainerCallback):
    """Lets the hand loop run a block of steps before each block of the trainer, and times both."""

    def __init__(self, hand: Callable[[int], None], block: int) -> None:
        self.hand, self.block = hand, block
        self.hand_seconds: list[float] = []
        self.trainer_seconds: list[float] = []
        self.between_seconds: list[float] = []
        self._ended: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._ended is not None:
            self.between_seconds.append(time.perf_counter() - self._ended)
        if state.global_step % self.block == 0:
            for step in range(state.global_step, state.global_step + self.block):
                start = time.perf_counter()
                self.hand(step)
                self.hand_seconds.append(time.perf_counter() - start)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._ended = time.perf_counter()
        self.trainer_seconds.append(self._ended - self._start)

    def summary(self) -> dict:
        # The first block of both sides allocates the optimizer's state.
        own, theirs = self.trainer_seconds[self.block :], self.hand_seconds[self.block :]
        blocks = range(0, len(own), self.block)
        ratios = [sum(own[b : b + self.block]) / sum(theirs[b : b + self.block]) for b in blocks]
        low, _, high = statistics.quantiles(ratios, n=4)
        return {
            "ratio": statistics.median(ratios), "ratio_quartiles": [low, high], "blocks": len(ratios),
            "ratio_of_medians": statistics.median(own) / statistics.median(theirs),
            "trainer_step_seconds": statistics.median(own), "hand_step_seconds": statistics.median(theirs),
            "between_trainer_steps_seconds": statistics.median(self.between_seconds),
        }  # fmt: skip


def measure(
    mode: str, args: argparse.Namespace, student: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset,
    collator: DataCollatorWithPadding, folder: str,
) -> dict:  # fmt: skip
    kind, cached = mode.removesuffix("_cached"), mode.endswith("_cached")
    order = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
    batches = [
        dict(collator([dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]))
        for chunk in order
    ]
    torch.manual_seed(args.seed)
    guide = None if cached else copy.deepcopy(teacher).requires_grad_(kind == "joint").eval()
    hand = HandLoop(copy.deepcopy(student), guide, kind)
    alternate = Alternate(lambda step: hand.step(batches[step % len(batches)]), args.block)
    joint = {"teacher_learning_rate": LEARNING_RATE, "save_teacher": False} if kind == "joint" else {}
    arguments = (hc.JointTeacherArguments if joint else hc.DistillationArguments)(
        folder, alpha_task=1.0, alpha_output=float(kind == "output"), alpha_layer=float(kind != "output"), **joint,
        temperature=TEMPERATURE, teacher_cache_dir=f"{folder}/cache-{kind}" if cached else None,
        max_steps=args.block * args.blocks, per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch_fused", train_sampling_strategy="sequential",
        save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True, seed=args.seed,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = (hc.JointTeacherTrainer if joint else hc.DistillationTrainer)(
        model=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), args=arguments, train_dataset=rows,
        eval_dataset=rows, data_collator=collator, callbacks=[alternate],
    )  # fmt: skip
    if cached:
        # Evaluation asks the teacher for every example once: the cache is warm after it.
        trainer.evaluate()
        trainer.teacher_cache.hits = trainer.teacher_cache.misses = 0
    outcome = trainer.train()
    result = {**alternate.summary(), "hand_loss": statistics.mean(hand.losses), "trainer_loss": outcome.training_loss}
    if cached:
        result["cache_hits"], result["cache_misses"] = trainer.teacher_cache.hits, trainer.teacher_cache.misses
    return result


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    load = os.getloadavg()[0]
    task = load_task(DataArguments(task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length))
    tokenizer = open_tokenizer(args.model)
    torch.manual_seed(args.seed)
    teacher = open_model(args.model, task, fresh_head=True)
    student = copy.deepcopy(teacher)
    rows = task.encode("train", tokenizer, args.max_length)
    hc.compress(
        student,
        hc.StructuredPruningConfig(mac_ratio=args.mac_ratio),
        data=calibration_batches(rows, tokenizer, min(128, len(rows)), args.seed),
    )
    if args.freeze_embeddings:
        freeze_embeddings_(student)
    rows = rows.shuffle(seed=args.seed).select(range(min(len(rows), args.batches * args.batch_size)))
    # Neighbours in length share a batch, as in training with group_by_length.
    lengths = [len(ids) for ids in rows["input_ids"]]
    rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
    rows = rows.select(range(len(rows) // args.batch_size * args.batch_size))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in args.modes:
            results[mode] = measure(mode, args, student, teacher, rows, DataCollatorWithPadding(tokenizer), folder)
            found = results[mode]
            against = "student step alone" if mode.endswith("_cached") else "student step + teacher forward"
            against = "student step + teacher step" if mode == "joint" else against
            print(
                f"{mode:14s} {found['ratio']:.3f} x {against} "
                f"(quartiles {found['ratio_quartiles'][0]:.3f} to {found['ratio_quartiles'][1]:.3f}; trainer "
                f"{1e3 * found['trainer_step_seconds']:.1f} ms, by hand {1e3 * found['hand_step_seconds']:.1f} ms)",
                flush=True,
            )
    report = {
        "arguments": arguments_of(args), "commit": commit(), "results": results,
        "tokens_per_example": sum(lengths) / len(lengths),
        "environment": machine(load),
    }  # fmt: skip
    print(f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    main()
