"""Students of one teacher: hard labels, distillation from a tuned teacher, and proximal training, as one table.

    python benchmarks/proximal.py --teacher MODEL --data_dir DATA/sick DATA/sst2_sentences --student shallow bilstm \
        --out benchmarks/results/proximal.jsonl --seeds 0 1 2

Every method trains on the same rows for as many updates. Learning rates are chosen with the first seed on rows of the
training split that nothing trains on, by the mean accuracy over the tasks: once for the teacher, and for each student
once for hard labels, once for each kind of distillation, and once for proximal training (at `--tuned_weight`). Each
finished cell is one line of the result file and is not computed again; `--table` prints what the file holds. On a GPU
several cells at once keep it busy: `--workers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from header import commit, machine
from proximal_table import print_table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.models import fit_labels, freeze_embeddings_, open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.stages.training import add_teacher_columns, trainer_arguments
from hf_compress.tasks.inputs import row_lengths
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.sources import DataArguments, Task, load_task


STUDENTS = ("shallow", "bilstm", "small")
METHODS = ("hard", "distillation", "distillation_labels", "proximal")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="A pretrained encoder, not tuned.")
    parser.add_argument("--data_dir", nargs="+", required=True)
    parser.add_argument("--tuned_on", nargs="+", help="Tasks (names of folders) that choose the rates; default: all.")
    parser.add_argument("--only", nargs="+", help="Tasks that are computed beyond that choice; default: all.")
    parser.add_argument("--student", nargs="+", default=["shallow"], choices=STUDENTS)
    parser.add_argument("--small_model", help="The pretrained encoder that is the student `small`.")
    parser.add_argument("--student_layers", type=int, default=3, help="Layers of the student `shallow`.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--proximal_weights", type=float, nargs="+", default=[0.4, 0.0, 0.7, 0.2])
    parser.add_argument("--tuned_weight", type=float, default=0.4, help="The learning rate is chosen with this one.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The first one chooses the rates.")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--bilstm_learning_rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--teacher_learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--proximal", type=json.loads, default={}, help="More fields of ProximalArguments, as JSON.")
    parser.add_argument("--train_rows", type=int, default=1200)
    parser.add_argument("--heldout_rows", type=int, default=800)
    parser.add_argument("--test_rows", type=int, default=1500)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--out", required=True, help="JSON lines.")
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--workers", type=int, default=1, help="Processes that compute cells.")
    parser.add_argument("--tf32", action="store_true", help="Matrix products of TensorFloat-32, on a GPU.")
    parser.add_argument("--commit", help="Where there is no git.")
    parser.add_argument("--table", action="store_true", help="Train nothing; print the table.")
    return parser.parse_args()


def bilstm(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> PreTrainedModel:
    """A BiLSTM that reads the teacher's word embeddings, projected, scaled to a variance of 1, and frozen."""
    pairs = isinstance(task, SequenceClassification) and len(task.text_columns) == 2
    settings = {"pair_mode": "separate" if pairs else "joint", **task.head_settings()}
    model = hc.students.BiLSTMForSequenceClassification(hc.students.BiLSTMConfig.for_tokenizer(tokenizer, **settings))
    hc.students.start_embeddings_(model, teacher, scale=1.0, frozen=True)
    return model


# Task, student, method, seed, learning rate, proximal weight.
Place = tuple[str, str, str, int, float, float]


class Cells:
    """A file of JSON lines, one for each finished cell."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.file, self.args = Path(args.out), args
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.found: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Take over what other processes have added."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.found = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The cell with exactly these settings."""
        return next((cell for cell in self.found if cell["key"] == key), None)

    def add(self, key: dict[str, Any], scores: dict[str, Any], start: float) -> dict[str, Any]:
        cell = {"key": key, **scores, "seconds": round(time.time() - start, 1), "commit": self.args.commit or commit()}
        cell["machine"] = {k: v for k, v in machine().items() if k != "load_average_1min"}
        if torch.cuda.is_available():
            cell["machine"] |= {"gpu": torch.cuda.get_device_name(), "tf32": self.args.tf32}
        with self.file.open("a") as out:
            out.write(json.dumps(cell) + "\n")
        self.found.append(cell)
        print(time.strftime("%H:%M:%S"), json.dumps(key), json.dumps(scores), cell["seconds"], flush=True)
        return cell


class Grid:
    """The cells of one command: what they train on, and the rates chosen for them."""

    def __init__(self, args: argparse.Namespace, cells: Cells) -> None:
        self.args, self.cells = args, cells
        self._rows: dict[tuple[str, int], dict[str, Dataset]] = {}
        self.tasks = {Path(folder).name: self._task(folder) for folder in args.data_dir}
        self.folders = {Path(folder).name: folder for folder in args.data_dir}

    def _data(self, folder: str) -> DataArguments:
        return DataArguments(data_dir=folder, max_length=self.args.max_length)

    def _task(self, folder: str) -> Task:
        args, task = self.args, load_task(self._data(folder))
        splits, order = task.splits, task.splits["train"].shuffle(seed=0)
        splits["heldout"] = order.select(range(args.heldout_rows))
        last = min(args.heldout_rows + args.train_rows, len(order))
        splits["train"] = order.select(range(args.heldout_rows, last))
        if "test" in splits and args.test_rows < len(splits["test"]):
            splits["test"] = splits["test"].shuffle(seed=0).select(range(args.test_rows))
        return dataclasses.replace(task, splits=splits)

    def key(self, task: str, student: str, method: str, seed: int, rate: float, **more: Any) -> dict[str, Any]:
        args = self.args
        return {
            "task": task, "teacher": Path(args.teacher).name, "student": student, "method": method, **more,
            "seed": seed, "learning_rate": rate, "rows": len(self.tasks[task].splits["train"]),
            "epochs": args.epochs, "max_steps": args.max_steps, "batch_size": args.batch_size,
        }  # fmt: skip

    def rates(self, student: str) -> list[float]:
        args = self.args
        known = {"teacher": args.teacher_learning_rates, "bilstm": args.bilstm_learning_rates}
        return known.get(student, args.learning_rates)

    def chosen_rate(self, student: str, method: str) -> float:
        """The rate with the best mean accuracy over the tasks on the held-out rows, with the first seed."""
        rates, seed = self.rates(student), self.args.seeds[0]
        if len(rates) == 1:
            return rates[0]
        means = []
        for rate in rates:
            found = [
                self.cell(task, student, method, seed, rate, self.args.tuned_weight)
                for task in self.args.tuned_on or self.tasks
            ]
            means.append(sum(cell["heldout"]["accuracy"] for cell in found) / len(found))
        return rates[means.index(max(means))]

    def cell(
        self, task: str, student: str, method: str, seed: int, rate: float, weight: float = 0.0
    ) -> dict[str, Any]:
        """Compute a cell, or find it."""
        more: dict[str, Any] = {}
        if method != "hard":
            more["teacher_learning_rate"] = self.chosen_rate("teacher", "hard")
        if method == "proximal":
            more = {**more, "proximal_weight": weight, **self.args.proximal}
        key = self.key(task, student, method, seed, rate, **more)
        start, known = time.time(), self.cells.get(key)
        if known is not None and not (student == "teacher" and not self.teacher_folder(task, seed, rate).exists()):
            return known
        scores = self._train(task, student, method, seed, rate, more)
        return known or self.cells.add(key, scores, start)

    def teacher_folder(self, task: str, seed: int, rate: float) -> Path:
        args, rows = self.args, len(self.tasks[task].splits["train"])
        name = f"{Path(args.teacher).name}-{task}-{rows}-{args.epochs:g}-{args.max_steps}-{rate:g}-{seed}"
        return Path(args.work_dir, name)

    def open_student(self, student: str, task: Task, seed: int) -> PreTrainedModel:
        """A student before its training."""
        args = self.args
        set_seed(seed)
        if student == "small":
            model = open_model(args.small_model, task, fresh_head=True)
        else:
            model = open_model(args.teacher, task, fresh_head=True)
        model.config.update(task.names_for(model.config))
        if student == "shallow":
            count = model.config.num_hidden_layers
            layers = [(i + 1) * count // args.student_layers - 1 for i in range(args.student_layers)]
            model = hc.students.from_teacher(model, layers=layers)
        if student == "bilstm":
            return bilstm(model, open_tokenizer(args.teacher), task)
        freeze_embeddings_(model)
        return model

    def rows(self, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
        """The encoded rows of every split, made once for each task and vocabulary."""
        place = (name, tokenizer.vocab_size)
        if place not in self._rows:
            rows = {split: task.encode(split, tokenizer, self.args.max_length) for split in task.splits}
            rows["train"] = rows["train"].add_column("length", row_lengths(rows["train"]))
            self._rows[place] = rows
        return self._rows[place]

    def _train(
        self, name: str, student: str, method: str, seed: int, rate: float, more: dict[str, Any]
    ) -> dict[str, Any]:
        args = self.args
        model = self.open_student(student, self.tasks[name], seed)
        task = fit_labels(self.tasks[name], model, student)
        tokenizer = open_tokenizer(args.small_model if student == "small" else args.teacher)
        rows = self.rows(name, task, tokenizer)
        folder = self.teacher_folder(name, seed, rate)
        common = {
            "output_dir": tempfile.mkdtemp(dir=args.work_dir), "num_train_epochs": args.epochs, "learning_rate": rate,
            "max_steps": args.max_steps, "per_device_train_batch_size": args.batch_size, "warmup_steps": 0.06,
            "weight_decay": 0.01, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
            "logging_steps": 10_000, "report_to": "none", "seed": seed, "disable_tqdm": True,
            **({"tf32": True} if args.tf32 else {}),
        }  # fmt: skip
        trainer_class, teacher, teacher_name = hc.DistillationTrainer, None, args.teacher
        if method == "hard":
            arguments = hc.DistillationArguments(**common, alpha_output=0.0)
        elif method == "proximal":
            trainer_class = hc.ProximalTrainer
            arguments = hc.ProximalArguments(**common, **more, save_teacher=False)
            set_seed(seed)
            teacher = open_model(args.teacher, task, fresh_head=True)
            freeze_embeddings_(teacher)
        else:
            tuned = self.cell(name, "teacher", "hard", seed, more["teacher_learning_rate"])["key"]["learning_rate"]
            teacher_name = str(self.teacher_folder(name, seed, tuned))
            teacher = open_model(teacher_name, task)
            loss = {"alpha_task": 0.0, "temperature": 1.0} if method == "distillation" else {}
            # The student's and the teacher's rows differ in `small`; everywhere else the outputs are stored once.
            cache = None if student == "small" else f"{teacher_name}-outputs"
            arguments = hc.DistillationArguments(**common, **loss, teacher_cache_dir=cache)
        given = trainer_arguments(task, model, tokenizer, arguments, {"train": rows["train"]})
        if teacher is not None:
            add_teacher_columns(given, task, self._data(self.folders[name]), teacher_name)
        trainer = trainer_class(teacher_model=teacher, **given)
        outcome = trainer.train()
        scores: dict[str, Any] = {
            split: evaluate_model(model, found, tokenizer, 64) for split, found in rows.items() if split != "train"
        }
        scores["train_seconds"] = round(outcome.metrics["train_runtime"], 1)
        scores["train_loss"] = outcome.metrics["train_loss"]
        # The teacher of `small` reads another tokenizer's rows.
        if method == "proximal" and student != "small":
            scores["teacher"] = {"heldout": evaluate_model(teacher, rows["heldout"], tokenizer, 64)}
        if student == "teacher":
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        shutil.rmtree(common["output_dir"], ignore_errors=True)
        del trainer, model, teacher, given
        gc.collect()
        return scores

    def steps(self) -> Iterator[list[Place]]:
        """Lists of cells: those of one list need what the lists before it have found, and nothing of each other."""
        args, first = self.args, self.args.seeds[0]
        tuned, tasks = list(args.tuned_on or self.tasks), list(args.only or self.tasks)
        if args.methods != ["hard"]:
            yield [(task, "teacher", "hard", first, rate, 0.0) for rate in self.rates("teacher") for task in tuned]
            rate = self.chosen_rate("teacher", "hard")
            yield [(task, "teacher", "hard", seed, rate, 0.0) for seed in args.seeds for task in tasks]
        yield [
            (task, student, method, first, rate, args.tuned_weight)
            for method in reversed(args.methods) for student in args.student if len(self.rates(student)) > 1
            for rate in self.rates(student) for task in tuned
        ]  # fmt: skip
        yield [
            (task, student, method, seed, self.chosen_rate(student, method), weight)
            for seed in args.seeds for method, weight in self.variants() for student in args.student for task in tasks
        ]  # fmt: skip

    def variants(self) -> Iterator[tuple[str, float]]:
        """Methods, and proximal training once for each weight."""
        for method in self.args.methods:
            for weight in self.args.proximal_weights if method == "proximal" else (0.0,):
                yield method, weight


_grids: list[Grid] = []


def open_worker(args: argparse.Namespace) -> None:
    """Prepare this process for `compute`."""
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    torch.manual_seed(0)
    if args.workers > 1:
        torch.set_num_threads(1)
    _grids.append(Grid(args, Cells(args)))


def compute(place: Place) -> bool:
    """Compute one cell in a process that `open_worker` has prepared; say whether it went well."""
    [grid] = _grids
    grid.cells.read()
    try:
        grid.cell(*place)
    except Exception:
        print(place, traceback.format_exc(), file=sys.stderr, flush=True)
        return False
    return True


def compute_all(args: argparse.Namespace) -> bool:
    """Compute all cells, those of one step at once; say whether all went well."""
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        open_worker(args)
        [grid] = _grids
        failed = [place for step in grid.steps() for place in dict.fromkeys(step) if not compute(place)]
        return not failed
    grid, well = Grid(args, Cells(args)), True
    with multiprocessing.get_context("spawn").Pool(args.workers, open_worker, (args,)) as pool:
        for step in grid.steps():
            done: Iterable[bool] = pool.imap_unordered(compute, dict.fromkeys(step))
            well = all(list(done)) and well
            grid.cells.read()
    return well


def main() -> bool:
    """Print the table, after the cells that are missing; say whether all went well."""
    args = parse()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    well = args.table or compute_all(args)
    print_table(Cells(args).found)
    return well


if __name__ == "__main__" and not main():
    sys.exit(1)
