"""Shell completion: what may come next on a command line, and the lines that make a shell ask for it.

Like the help, the answers come from the source of the options: a press of the Tab key must not wait for torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from hf_compress.cli.help import DEMO_COMMAND, RECIPE_COMMAND
from hf_compress.cli.options import Group, class_fields, stage_groups
from hf_compress.stages.table import Stage, all_stages


# Where nothing is proposed, the shell offers file names.
_BASH = """_hf_compress() {
    local IFS=$'\\n'
    COMPREPLY=($(hf-compress --complete "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _hf_compress hf-compress"""
_SHELLS = {
    "bash": _BASH,
    # zsh reads completions of bash through a part of its own.
    "zsh": f"autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit\n{_BASH}",
}


def completion_script(shell: str) -> str:
    """The lines for a shell's start-up file, where `eval "$(hf-compress --completion bash)"` reads them.

    Args:
        shell: `bash` or `zsh`.

    Raises:
        ValueError: For another shell.
    """
    if shell not in _SHELLS:
        raise ValueError(f"completion must be for one of {', '.join(_SHELLS)}, got {shell!r}.")
    return _SHELLS[shell]


def proposals(words: Sequence[str]) -> list[str]:
    """What the last word of a command line may become.

    Args:
        words: The command line after the program's name; the last word is the one that is being typed, maybe empty.

    Returns:
        Whole words that begin with it; none where a file or a free value is expected.

    Example:
        >>> proposals(["prune-w"])
        ['prune-weights']
        >>> proposals(["prune-weights", "--criterion", "snip"])
        ['snip', 'snip_momentum']
    """
    # bash hands over --flag=value as three words, and --flag= as two.
    *before, current = words or [""]
    before, current = [word for word in before if word != "="], current.removeprefix("=")
    commands = {stage.command: stage for stage in all_stages().values()}
    if not before:
        found = [DEMO_COMMAND, *commands, RECIPE_COMMAND, "--help", "--version", "--completion"]
    elif before[0] == "--completion":
        found = [*_SHELLS] if len(before) == 1 else []
    elif before[0] in (DEMO_COMMAND, RECIPE_COMMAND):
        found = ["--dry_run", "--help"] if current.startswith("-") else []
    elif before[0] not in commands:
        found = []
    else:
        found = _of_command(commands[before[0]], before[-1], current)
    return [word for word in found if word.startswith(current)]


def _of_command(stage: Stage, last: str, current: str) -> list[str]:
    groups = stage_groups(stage).values()
    options = [option for group in groups for option in group.options if option.name not in stage.unused]
    kinds = {option.name: option.kind for option in options}
    if not current.startswith("-"):
        return _values(kinds.get(last.removeprefix("--").replace("-", "_"), "")) if last.startswith("--") else []
    training = [name for group in groups for name in _inherited(group)]
    names = dict.fromkeys([*kinds, *(name for name in training if name not in stage.unused), "config"])
    further = ["--help", "--traceback"] + ["--help_all"] * bool(training)
    return [*(f"--{name}" for name in names), *further]


def _inherited(group: Group) -> list[str]:
    return class_fields("transformers.training_args", "TrainingArguments") if group.training else []


def _values(kind: str) -> list[str]:
    """The words that an option of a kind takes.

    Example:
        >>> _values("Literal['local', 'global'] | None"), _values("bool"), _values("int | None")
        (['local', 'global'], ['true', 'false'], [])
    """
    literals = [ast.literal_eval(f"[{inside}]") for inside in re.findall(r"Literal\[([^\]]*)\]", kind)]
    words = [word for literal in literals for word in literal if isinstance(word, str)]
    return words + ["true", "false"] * bool(re.search(r"\bbool\b", kind))
