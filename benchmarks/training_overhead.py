"""What a step of `DistillationTrainer` costs beyond the arithmetic: against a loop written by hand.

    python benchmarks/training_overhead.py --model MODEL --data_dir DATA/sst2_sentences --out benchmarks/results/x.json

The student is the model pruned to half its multiply-accumulates, the teacher the model itself. Six ratios:
`output` and `layer`: trainer step / (student step + teacher forward by hand); `output_cached` and `layer_cached`:
trainer step with all of the teacher's outputs on disk / student step alone by hand; `joint`: step of
`JointTeacherTrainer` with hidden states / (student step + teacher step by hand); `proximal`: step of
`ProximalTrainer` / (its four forward and two backward passes and two updates by hand). Hand and trainer alternate in
blocks of steps on the same batches, in one run; a ratio is the median over the blocks after the first pass through the
batches: on a GPU the side that goes first pays for each new shape (kernels that are loaded, memory that is reserved).
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
from datasets import Dataset
from hand_loop import CLIP, HALF, LEARNING_RATE, PROXIMAL_WEIGHT, TEMPERATURE, HandLoop
from header import arguments_of, commit, machine
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.stages.models import freeze_embeddings_, open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.inputs import calibration_batches
from hf_compress.tasks.sources import DataArguments, load_task


# What `now` reads.
CLOCK = [time.perf_counter]
MODES = ("output", "layer", "output_cached", "layer_cached", "joint", "proximal")
KINDS = {
    "joint": (hc.JointTeacherTrainer, hc.JointTeacherArguments),
    "proximal": (hc.ProximalTrainer, hc.ProximalArguments),
}


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
    parser.add_argument("--processor_time", action="store_true", help="Of this process, where others use the machine.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    return parser.parse_args()


def now() -> float:
    """The clock, once the accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return CLOCK[0]()


class Alternate(TrainerCallback):
    """Lets the hand loop run a block of steps before each block of the trainer, and times both.

    Args:
        hand: Makes the step of a number by hand.
        block: Steps before the other side takes its turn.
        different: Batches that differ; steps on a batch that is new are not counted.
    """

    def __init__(self, hand: Callable[[int], None], block: int, different: int) -> None:
        self.hand, self.block, self.new = hand, block, -(-different // block) * block
        self.hand_seconds: list[float] = []
        self.trainer_seconds: list[float] = []
        self.between_seconds: list[float] = []
        self._ended: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._ended is not None:
            self.between_seconds.append(now() - self._ended)
        if state.global_step % self.block == 0:
            for step in range(state.global_step, state.global_step + self.block):
                start = now()
                self.hand(step)
                self.hand_seconds.append(now() - start)
        self._start = now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._ended = now()
        self.trainer_seconds.append(self._ended - self._start)

    def summary(self) -> dict:
        own, theirs = self.trainer_seconds[self.new :], self.hand_seconds[self.new :]
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
    """Time a trainer against the loop by hand; both models run where they are."""
    kind, cached = mode.removesuffix("_cached"), mode.endswith("_cached")
    order = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
    batches = [
        dict(collator([dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]))
        for chunk in order
    ]
    torch.manual_seed(args.seed)
    guide = None if cached else copy.deepcopy(teacher).requires_grad_(kind in KINDS).eval()
    hand = HandLoop(copy.deepcopy(student), guide, kind, args.precision)
    alternate = Alternate(lambda step: hand.step(batches[step % len(batches)]), args.block, len(batches))
    trainer_class, arguments_class = KINDS.get(kind, (hc.DistillationTrainer, hc.DistillationArguments))
    options = {"alpha_task": 1.0, "alpha_output": float(kind == "output"), "alpha_layer": float(kind != "output")}
    options |= {"temperature": TEMPERATURE}
    if kind == "proximal":
        # Heads that begin with zeros would leave the encoders without gradients at first.
        options = {"proximal_weight": PROXIMAL_WEIGHT, "zero_init_heads": False}
    if kind in KINDS:
        options |= {"teacher_learning_rate": LEARNING_RATE, "save_teacher": False}
    arguments = arguments_class(
        folder, **options, teacher_cache_dir=f"{folder}/cache-{kind}" if cached else None,
        max_steps=args.block * args.blocks, per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch_fused", train_sampling_strategy="sequential",
        save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True, seed=args.seed,
        dataloader_pin_memory=False, use_cpu=student.device.type == "cpu",
        **({args.precision: True} if args.precision in HALF else {}),
    )  # fmt: skip
    trainer = trainer_class(
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
    CLOCK[0] = time.process_time if args.processor_time else time.perf_counter
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
            models = student.to(args.device), teacher.to(args.device)
            results[mode] = measure(mode, args, *models, rows, DataCollatorWithPadding(tokenizer), folder)
            found = results[mode]
            against = "student step alone" if mode.endswith("_cached") else "student step + teacher forward"
            against = "student step + teacher step" if mode == "joint" else against
            against = "four forwards and two backwards" if mode == "proximal" else against
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
