"""The processes of one run: what their launcher told them, and the end of one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hf_compress.core.errors import first_line


_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# What gloo, NCCL and torch's store say when the process at the other end is gone or silent.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket Timeout|[Tt]imed out waiting|remote process exited|"
    r"NCCL (communicator was aborted|error)|wait timeout|failed to recv"
)


class LostProcess(RuntimeError):
    """Another process of this run has ended, or no longer answers."""


def check_launcher() -> None:
    """Refuse an environment that only half says that this process is one of several.

    accelerate would wait for processes that nobody starts, or train alone in each.

    Raises:
        ValueError: Names the variables that are missing or contradict each other.
    """
    set_ones = {name: value for name in (*_NUMBERS, *_ADDRESS) if (value := os.environ.get(name))}
    remedy = "Start with torchrun or accelerate launch, which set all of them, or unset them to train alone."
    numbers: dict[str, int] = {}
    for name in _NUMBERS:
        text = set_ones.get(name, "")
        if text and not re.fullmatch(r"-?\d+", text):
            raise ValueError(f"The environment has {name}={text!r}, which is no number. {remedy}")
        # -1 is an older way to say that there is no launcher.
        if text and int(text) >= 0:
            numbers[name] = int(text)
    if not numbers or numbers.get("WORLD_SIZE") == 1 and not numbers.get("RANK"):
        return
    found = ", ".join(f"{name}={numbers[name]}" for name in numbers)
    missing = [name for name in _NUMBERS if name not in numbers] + [name for name in _ADDRESS if name not in set_ones]
    if missing:
        raise ValueError(f"The environment has {found}, but not {', '.join(missing)}. {remedy}")
    if numbers["RANK"] >= numbers["WORLD_SIZE"] or numbers["LOCAL_RANK"] > numbers["RANK"]:
        raise ValueError(
            f"The environment has {found}: RANK must be below WORLD_SIZE and LOCAL_RANK not above RANK. {remedy}"
        )


# What a training leaves behind for a person to go on from.
_CHECKPOINT = " The last whole checkpoint stays; resume_from_checkpoint=True goes on from it"


@contextmanager
def lost_process_named(num_processes: int, work: str = "training", then: str = _CHECKPOINT) -> Iterator[None]:
    """Say in one line when the block fails because another process is gone.

    Args:
        num_processes: How many work together.
        work: What they do.
        then: What the message says about the state that is left.

    Raises:
        LostProcess: Instead of the error of the library that carries their messages.
    """
    try:
        yield
    except RuntimeError as error:
        if num_processes == 1 or isinstance(error, LostProcess) or not _LOST.search(str(error)):
            raise
        raise LostProcess(
            f"One of the {num_processes} processes of this {work} has ended or no longer answers: its own message "
            f"says why.{then} ({first_line(error)})"
        ) from error
