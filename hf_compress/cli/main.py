"""`hf-compress <command>`: names the commands and turns what goes wrong into exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from huggingface_hub.errors import HFValidationError

from hf_compress.cli import commands
from hf_compress.cli.parsing import BadInput, fail


COMMANDS = {
    "demo": commands.demo,
    "finetune": commands.finetune,
    "prune-structure": commands.prune_structure,
    "prune-tokens": commands.prune_tokens,
    "prune-weights": commands.prune_weights,
    "distill": commands.distill,
    "joint-distill": commands.joint_distill,
    "linearize": commands.linearize,
    "snapshot-distill": commands.snapshot_distill,
    "evaluate": commands.evaluate,
    "report": commands.report,
}

USAGE = """usage: hf-compress <command> [--config file.yaml] [--flag value ...]

commands:
  demo             fine-tune, prune to half the arithmetic, recover, report, reload: offline, on real text
  finetune         train a classifier or regressor on a task
  prune-structure  remove attention heads and neurons without retraining
  prune-tokens     learn which tokens can be dropped on the way through the layers
  prune-weights    zeros in a pattern (N:M, blocks, channels): in training, with or without a teacher, or at once
  linearize        replace softmax attention by linear attention (Linformer)
  distill          teach a (compressed) student what a fine-tuned teacher knows
  joint-distill    the same from a teacher that is fine-tuned at the same time
  snapshot-distill the same from the saved states of a teacher's fine-tuning
  evaluate         metrics of saved models on a task
  report           dense against compressed: quality, size, arithmetic, measured latency

hf-compress <command> --help lists the options. Exit codes: 0 done, 2 bad input, 1 anything else."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the program's name; None: the process's.

    Returns:
        0 done, 2 bad input (one line on standard error says what to change), 1 anything else.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return fail(f"command must be one of {', '.join(COMMANDS)}, got {name!r}.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_compress").setLevel(logging.INFO)
    try:
        COMMANDS[name](rest)
    except (BadInput, ValueError, HFValidationError) as error:
        return fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return fail(f"{error.strerror}: {error.filename}")
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
