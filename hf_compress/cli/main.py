"""`hf-compress <command>`: answers at once what needs no model, and turns errors into exit codes."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from hf_compress import __version__
from hf_compress.cli.completion import completion_script, proposals
from hf_compress.cli.errors import describe, fail, is_bad_input
from hf_compress.cli.help import DEMO_COMMAND, RECIPE_COMMAND, command_help, demo_help, recipe_help, usage
from hf_compress.core.launcher import LostProcess
from hf_compress.stages.table import all_stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name. None: that of this process.

    Returns:
        0 done, 2 bad input (one line on standard error says what to change), 1 anything else, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        return _answer(arguments)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(f"hf-compress: interrupted{_how_to_go_on(arguments)}", file=sys.stderr)
        return 130
    except LostProcess as error:
        print(f"hf-compress: {describe(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        bad = is_bad_input(error)
        if with_traceback or not bad:
            traceback.print_exc()
        if bad:
            return fail(describe(error))
        print("hf-compress: unexpected error, see the traceback above; please report it.", file=sys.stderr)
        return 1


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[:1] in ([RECIPE_COMMAND], [DEMO_COMMAND]):
        return "; the same command goes on"
    return "; --resume_from_checkpoint true continues a training" if "output_dir" in " ".join(arguments) else ""


def _answer(arguments: list[str]) -> int:
    # No argparse sub-parsers: each would have to know its flags, and so import torch, before it is known which
    # command was typed. The command is looked up in the table of stages; its parser is built after that.
    if not arguments:
        print(usage())
        return 2
    name, *rest = arguments
    if name == "--version":
        print(f"hf-compress {__version__}")
        return 0
    if name == "--completion":
        print(completion_script(" ".join(rest)))
        return 0
    if name == "--complete":
        print("\n".join(proposals(rest)))
        return 0
    commands = {stage.command: stage for stage in all_stages().values()}
    asks = [argument for argument in arguments if argument in ("-h", "--help", "--help_all", "--help-all")]
    if asks and (named := next((argument for argument in arguments if argument in commands), None)):
        print(command_help(commands[named]))
        if asks[0] in ("--help_all", "--help-all"):
            print(f"\ntransformers.TrainingArguments\n{import_module('hf_compress.cli.commands').training_help()}")
        return 0
    if asks and RECIPE_COMMAND in arguments:
        print(recipe_help())
        return 0
    if asks and DEMO_COMMAND in arguments:
        print(demo_help())
        return 0
    if asks and name.startswith("-"):
        print(usage())
        return 0
    names = [DEMO_COMMAND, *commands, RECIPE_COMMAND]
    if name not in names:
        near = difflib.get_close_matches(name.replace("_", "-"), names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return fail(f"command must be one of {', '.join(names)}, got {name!r}.{hint}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("hf_compress").setLevel(logging.INFO)
    # The stages import torch and transformers, which takes seconds: help and typing errors above do not wait for it.
    if name == RECIPE_COMMAND:
        import_module("hf_compress.cli.recipe").run_recipe(rest)
        return 0
    if name == DEMO_COMMAND:
        import_module("hf_compress.cli.recipe").run_demo(rest)
        return 0
    import_module("hf_compress.cli.commands").run(commands[name], rest)
    return 0


def entry() -> None:
    """The console script."""
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output (`| head`) has closed it; Python would report that once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
