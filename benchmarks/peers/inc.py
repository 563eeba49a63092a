"""Weight pruning here against Intel Neural Compressor 3.7.1: accuracy, masks, and what the hooks cost a step.

    PYTHONPATH=.:benchmarks python benchmarks/peers/inc.py --model DENSE --data_dir DATA/sst2_sentences --out x.json

Three copies of one model (dense, pruned by us, pruned by them) see the same batches with the same dropout, in turns of
a block of steps, in one process and one plain loop. Both sides' hooks are called at the same places and timed by
themselves; `overhead` is their time over the time of the dense steps. README.md beside this file has the set-up.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from header import arguments_of, commit, machine
from neural_compressor.config import WeightPruningConfig as TheirConfig
from neural_compressor.training import prepare_compression
from torch import Tensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.methods.weight_pruning.groups import groups_of
from hf_compress.report.quality import evaluate_model
from hf_compress.report.sparsity import element_ratio, matrices_of
from hf_compress.stages.models import freeze_embeddings_, open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task


CLIP = 1.0
MOMENTS = ("begin", "before", "after")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A fine-tuned classifier.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--target_sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--start_step", type=int, default=20)
    parser.add_argument("--end_step", type=int, default=150)
    parser.add_argument("--pruning_frequency", type=int, default=10)
    parser.add_argument("--block", type=int, default=5, help="Steps before the next side takes its turn.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze_embeddings", action="store_true", help="Shorter steps, so hooks weigh more.")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: what other processes take is left out.")
    parser.add_argument("--note", default="", help="Written to the result, e.g. how busy the machine was.")
    return parser.parse_args()


class Side:
    """One model in training, with hooks or without, and how long its steps and hooks took."""

    def __init__(self, model: PreTrainedModel, learning_rate: float, clock: Callable[[], float]) -> None:
        self.model, self.clock = model.train(), clock
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.01)
        self.hooks: dict[str, Callable[[int], None]] = {}
        self.step_seconds: list[float] = []
        self.hook_seconds: list[dict[str, float]] = []

    def _hook(self, moment: str, step: int) -> None:
        start = self.clock()
        if moment in self.hooks:
            self.hooks[moment](step)
        self.hook_seconds[-1][moment] = self.clock() - start

    def step(self, number: int, batch: dict[str, Tensor], seed: int) -> None:
        torch.manual_seed(seed + number)
        self.hook_seconds.append({})
        start = self.clock()
        self._hook("begin", number)
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self._hook("before", number)
        self.optimizer.step()
        self._hook("after", number)
        self.optimizer.zero_grad()
        self.step_seconds.append(self.clock() - start)


def prune_here(side: Side, args: argparse.Namespace, schedule: dict[str, Any]) -> Callable[[], None]:
    """Our callback, called as `Trainer` calls it; returns what ends the training."""
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(**schedule))
    state = TrainerState(max_steps=args.steps, num_train_epochs=1)
    common = {"args": TrainingArguments("unused", report_to="none", use_cpu=True), "control": TrainerControl()}

    def call(event: str) -> Callable[[int], None]:
        def hook(step: int) -> None:
            state.global_step = step
            getattr(callback, event)(state=state, model=side.model, optimizer=side.optimizer, **common)

        return hook

    call("on_train_begin")(0)
    events = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")
    side.hooks = {moment: call(event) for moment, event in zip(MOMENTS, events, strict=True)}
    return lambda: call("on_train_end")(args.steps)


def prune_there(side: Side, args: argparse.Namespace, schedule: dict[str, Any]) -> Callable[[], None]:
    """Their documented hooks; the same layers as ours: no pooler, no head."""
    criterion = schedule.pop("criterion")
    entry = {"op_names": [], "excluded_op_names": ["pooler", "classifier"], "pruning_type": criterion, **schedule}
    entry["pruning_scope"] = entry.pop("scope")
    manager = prepare_compression(model=side.model, confs=TheirConfig([entry], pruning_op_types=["Linear"]))
    manager.callbacks.on_train_begin()
    side.model = getattr(manager.model, "model", manager.model)
    side.hooks = {
        "begin": lambda step: manager.callbacks.on_step_begin(step),
        "before": lambda step: manager.callbacks.on_before_optimizer_step(),
        "after": lambda step: manager.callbacks.on_after_optimizer_step(),
    }
    # Their end only prints a table.
    return lambda: None


def describe(side: Side, dense: Side, schedule: dict[str, Any]) -> dict[str, Any]:
    """Sparsity of a side's model and the cost of its hooks."""
    start, end, frequency = (schedule[key] for key in ("start_step", "end_step", "pruning_frequency"))
    hooks = [sum(times.values()) for times in side.hook_seconds]
    due = [start <= step <= end and not (step - start) % frequency for step in range(len(hooks))]
    # The first step allocates the optimizer's state; what comes after the last update is cheaper for us.
    normal = {"until_last_update": (1, end), "afterwards": (end + 1, len(hooks))}
    step = statistics.median(dense.step_seconds)
    found: dict[str, Any] = {
        f"ordinary_step_{name}": statistics.median(hooks[i] for i in range(*bounds) if not due[i]) / step
        for name, bounds in normal.items()
    }
    found["update_step"] = statistics.median(x for x, is_due in zip(hooks, due, strict=True) if is_due) / step
    found["overhead"] = sum(hooks[1:]) / sum(dense.step_seconds[1:])
    found["step_ratio"] = statistics.median(
        ours / plain for ours, plain in zip(side.step_seconds[1:], dense.step_seconds[1:], strict=True)
    )
    found["hook_ms"] = {m: 1e3 * statistics.median(times[m] for times in side.hook_seconds) for m in MOMENTS}
    return found


def zeros_of(model: PreTrainedModel, config: hc.WeightPruningConfig) -> Tensor:
    """[all weights that may be pruned] bool, True where zero."""
    layers = [prunable for group in groups_of(model, config) for prunable in group.weights]
    return torch.cat([(layer.weight.detach() == 0).flatten() for layer in layers])


def main() -> None:
    args, measured_at = parse(), commit()
    transformers_logging.set_verbosity_error()
    task = load_task(DataArguments(task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length))
    tokenizer = open_tokenizer(args.model)
    rows = {name: task.encode(name, tokenizer, args.max_length) for name in ("train", "validation")}
    shuffled = rows["train"].shuffle(seed=args.seed)
    batches = [
        dict(tokenizer.pad(shuffled[i : i + args.batch_size], return_tensors="pt"))
        for i in range(0, len(shuffled) - args.batch_size, args.batch_size)
    ]
    model = open_model(args.model, task)
    if args.freeze_embeddings:
        freeze_embeddings_(model)
    schedule = {
        "pattern": args.pattern, "target_sparsity": args.target_sparsity, "criterion": "snip_momentum",
        "scope": "global", "sparsity_decay_type": "exp", "start_step": args.start_step, "end_step": args.end_step,
        "pruning_frequency": args.pruning_frequency,
    }  # fmt: skip
    sides = {
        name: Side(copy.deepcopy(model), args.learning_rate, CLOCKS[args.clock])
        for name in ("dense", "ours", "theirs")
    }
    ends = [prune_here(sides["ours"], args, dict(schedule)), prune_there(sides["theirs"], args, dict(schedule))]
    for first in range(0, args.steps, args.block):
        for side in sides.values():
            for step in range(first, min(first + args.block, args.steps)):
                side.step(step, batches[step % len(batches)], args.seed)
    for end in ends:
        end()
    config = hc.WeightPruningConfig(**schedule)
    result: dict[str, Any] = {
        "arguments": arguments_of(args), "commit": measured_at, "environment": machine(), "numpy": numpy.__version__,
        "neural_compressor": importlib.metadata.version("neural_compressor"),
        "dense_step_ms": 1e3 * statistics.median(sides["dense"].step_seconds), "sides": {},
    }  # fmt: skip
    zeros = {name: zeros_of(side.model, config) for name, side in sides.items()}
    for name, side in sides.items():
        quality = evaluate_model(side.model, rows["validation"], tokenizer, 64)
        cost = {} if name == "dense" else describe(side, sides["dense"], schedule)
        result["sides"][name] = {
            "validation": quality, **cost, "zeros": int(zeros[name].sum()), "weights": len(zeros[name]),
            "element_sparsity": element_ratio(matrices_of(side.model)),
        }  # fmt: skip
    if ":" in args.pattern:
        count, group = map(int, args.pattern.split(":"))
        for name in ("ours", "theirs"):
            groups = zeros[name].view(-1, group).sum(1)
            result["sides"][name]["groups_with_too_few_zeros"] = int((groups < count).sum())
            result["sides"][name]["groups_with_too_many_zeros"] = int((groups > count).sum())
    result["equal_masks"] = float((zeros["ours"] == zeros["theirs"]).float().mean())
    result["overhead_ours_over_theirs"] = result["sides"]["ours"]["overhead"] / result["sides"]["theirs"]["overhead"]
    write_json(Path(args.out), result)
    print(result)


if __name__ == "__main__":
    main()
