"""Runs a stage from the command line: fills its arguments, runs it, prints its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments

from hf_compress.cli.output import print_results
from hf_compress.cli.parsing import parse
from hf_compress.core.launcher import check_launcher
from hf_compress.core.processes import is_first_process
from hf_compress.stages.arguments import StageArguments, kinds_of
from hf_compress.stages.table import Stage


def filled_from(
    stage: Stage,
    arguments: Sequence[str],
    written: tuple[str, Mapping[Any, Any]] | None = None,
    shared: Collection[str] = (),
) -> StageArguments:
    """Fill the arguments of a stage, and check all that can be checked without work.

    Args:
        stage: The stage.
        arguments: Flags and values.
        written: What messages call it, and 'name: value' lines from elsewhere.
        shared: Names among them that were not written for this stage alone: it may leave them unused.
    """
    kinds = kinds_of(stage)
    defaults = dict(stage.defaults)
    if any(issubclass(kind, TrainingArguments) for kind in kinds.values()):
        check_launcher()
        # Pinned memory only exists beside an accelerator; asking for it elsewhere warns at every epoch.
        defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
        defaults["disable_tqdm"] = not sys.stderr.isatty()
    parsed = parse(list(kinds.values()), arguments, defaults, stage.defaults_when, written)
    groups = dict(zip(kinds, parsed.values, strict=True))
    return stage.arguments_class(given=parsed.given - set(shared), **groups)


def run(stage: Stage, arguments: Sequence[str]) -> None:
    """Parse the arguments of a command, run its stage and print the results.

    Args:
        stage: The stage that the command runs.
        arguments: Flags and values.
    """
    quiet_files()
    filled = filled_from(stage, arguments)
    results = run_stage(stage, filled)
    if is_first_process():
        print_results(stage, filled, results)


def quiet_files() -> None:
    """Show no progress bars where nobody sees them move."""
    if not sys.stderr.isatty():
        # In a file, a progress bar is one line for each time it moves.
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers


def run_stage(stage: Stage, arguments: StageArguments) -> Mapping[str, Any]:
    """Run a stage with its arguments."""
    return stage.function(arguments)


def training_help() -> str:
    """The flags of `transformers.TrainingArguments`."""
    classes: Any = [TrainingArguments]
    return HfArgumentParser(classes, add_help=False, usage=argparse.SUPPRESS).format_help()
