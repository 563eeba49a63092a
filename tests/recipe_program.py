"""A recipe that a test starts and kills."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

from hf_compress.cli.main import main


def run(place: str, recipe: str, printed: str) -> None:
    """Run a recipe in a folder; what it prints goes to a file, line by line."""
    torch.set_num_threads(1)
    os.chdir(place)
    with open(printed, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(["run", recipe])
    sys.exit(code)


def begun(printed: Path) -> int:
    """How many stages have begun, of all runs that print there."""
    return printed.read_text().count(" left\n") if printed.exists() else 0
