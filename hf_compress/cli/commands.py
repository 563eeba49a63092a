"""Runs a stage from the command line: fills its arguments, runs it, prints its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

import datasets
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments

from hf_compress.cli.output import print_results
from hf_compress.cli.parsing import parse
from hf_compress.core.launcher import check_launcher
from hf_compress.core.processes import is_first_process
from hf_compress.methods import METHODS
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.table import Stage


def run(stage: Stage, arguments: Sequence[str]) -> None:
    """Parse the arguments of a command, run its stage and print the results.

    Args:
        stage: The stage that the command runs.
        arguments: Flags and values.
    """
    kinds = kinds_of(stage)
    defaults = dict(stage.defaults)
    if any(issubclass(kind, TrainingArguments) for kind in kinds.values()):
        check_launcher()
        # Pinned memory only exists beside an accelerator; asking for it elsewhere warns at every epoch.
        defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
        defaults["disable_tqdm"] = not sys.stderr.isatty()
    if not sys.stderr.isatty():
        # In a file, a progress bar is one line for each time it moves.
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
    parsed = parse(list(kinds.values()), arguments, defaults, stage.defaults_when)
    groups = dict(zip(kinds, parsed.values, strict=True))
    filled = stage.arguments_class(given=parsed.given, **groups)
    results = run_stage(stage, filled)
    if is_first_process():
        print_results(stage, filled, results)


def run_stage(stage: Stage, arguments: StageArguments) -> Mapping[str, Any]:
    """Run a stage with its arguments."""
    return stage.function(arguments)


def kinds_of(stage: Stage) -> dict[str, type]:
    """Topic -> dataclass that its options fill."""
    hints = get_type_hints(stage.arguments_class)
    kinds = {field.name: hints[field.name] for field in fields(stage.arguments_class) if field.name != "given"}
    if stage.method is not None:
        kinds["method"] = METHODS[stage.name].config_class
    return kinds


def training_help() -> str:
    """The flags of `transformers.TrainingArguments`."""
    classes: Any = [TrainingArguments]
    return HfArgumentParser(classes, add_help=False, usage=argparse.SUPPRESS).format_help()
