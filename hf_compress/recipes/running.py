"""Runs a recipe: each job in a folder of its own, those that are done skipped, one that was interrupted continued."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_compress.core.saving import remove_leftovers, sole_training, write_json
from hf_compress.core.shared_passes import shared_passes
from hf_compress.recipes.estimates import duration
from hf_compress.recipes.lineage import lineage_of, write_lineage
from hf_compress.recipes.log import FILE as LOG_FILE
from hf_compress.recipes.log import logged_to
from hf_compress.recipes.plan import Fill, Plan, Planned, doing, refreshed
from hf_compress.recipes.state import begin, finish
from hf_compress.recipes.target import NAME as TARGET
from hf_compress.recipes.target import chosen, verdict
from hf_compress.training.checkpoints import last_whole_checkpoint


logger = logging.getLogger(__name__)


def run_plan(plan: Plan, fill: Fill, say: Callable[[str], None]) -> dict[str, Mapping[str, Any]]:
    """Run the jobs of a plan that are not done.

    Args:
        plan: What `plan_of` gave.
        fill: Fills the arguments of a stage.
        say: Receives each line of progress.

    Returns:
        Job -> results of its stage, of all jobs, those that were done before among them.

    Raises:
        ValueError: If another process runs a recipe in this folder, this is one of several processes, or a stage
            refuses its input. What was finished before stays.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("run must be started as one process, got several: start the stages one by one instead.")
    results: dict[str, Mapping[str, Any]] = {}
    folder = Path(plan.recipe.output_dir)
    with sole_training(folder):
        remove_leftovers(folder)
        left = plan.seconds_left
        numbered = enumerate(plan.jobs, start=1)
        for _, members in itertools.groupby(numbered, key=lambda each: each[1].job.entry.name):
            # The members of a family differ in what is left of a model, not in what it is measured on.
            with shared_passes():
                for place, checked in members:
                    left = _take_turn(plan, place, checked, fill, say, left, results)
        _choose(plan, results, say)
    return results


def _take_turn(
    plan: Plan,
    place: int,
    checked: Planned,
    fill: Fill,
    say: Callable[[str], None],
    left: float,
    results: dict[str, Mapping[str, Any]],
) -> float:
    """Run or skip one job and note its results; returns the seconds that are left after it."""
    folder, title = Path(plan.recipe.output_dir), plan.title(place)
    # Another process may have run the recipe since it was planned.
    planned = refreshed(checked)
    if planned.state.results is not None:
        say(f"{title}  {doing(planned)}")
        results[planned.job.name] = planned.state.results
        return left - checked.seconds if checked.to_do else left
    say(f"{title}  {doing(planned)} of {duration(left)} left")
    with logged_to(folder / LOG_FILE) as warned:
        logger.info("%s begins with %s", title, dict(planned.values))
        seconds, results[planned.job.name] = _run(planned, fill, folder)
        logger.info("%s took %s", title, duration(seconds))
    about = f" ({warned.found} warning{'s' * (warned.found > 1)} in {LOG_FILE})" if warned.found else ""
    say(f"{title}  done in {duration(seconds)}{about}")
    return max(left - checked.seconds, 0.0)


def _choose(plan: Plan, results: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Say which model meets the recipe's target, and write it down."""
    target = plan.recipe.target
    if target is None:
        return
    found = chosen(results[TARGET], target.max_drop)
    write_json(Path(plan.recipe.output_dir, TARGET, "target.json"), found)
    for line in verdict(found, target.options["latency_batch_sizes"]):
        say(line)


def _run(planned: Planned, fill: Fill, folder: Path) -> tuple[float, Mapping[str, Any]]:
    """Run one job; returns its seconds and what its stage returned."""
    job, values = planned.job, dict(planned.values)
    begin(planned.folder, planned.inputs, planned.state)
    if "resume_from_checkpoint" in job.entry.kinds:
        # Where a training begins, some stages prepare the model; where it goes on, they do not.
        checkpoint = last_whole_checkpoint(planned.folder)
        if checkpoint is not None:
            values["resume_from_checkpoint"] = "true"
    # What a job draws must not depend on the jobs that this process has run before it.
    set_seed(values.get("seed", 0))
    start = time.perf_counter()
    try:
        results = job.entry.stage.function(fill(job.entry.stage, values, job.entry.shared))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    before = [folder / name for name in job.needs()]
    write_lineage(planned.folder, lineage_of(job, planned.inputs, seconds, before))
    finish(planned.folder, planned.inputs, seconds, results)
    return seconds, results
