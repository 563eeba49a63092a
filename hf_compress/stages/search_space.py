"""What a search may draw: ranges and choices for the numbers of a training, written as short texts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.stages.option_files import nearest
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.preflight import check_training


# From this ratio of its ends on, a range is drawn on a logarithmic scale.
_WIDE = 10


@dataclass(frozen=True)
class Dial:
    """One number that every trial draws.

    Args:
        name: The option.
        values: The choices, or the two ends of a range.
        is_range: Which of the two.
    """

    name: str
    values: tuple[float, ...]
    is_range: bool

    def draw(self, trial: Any) -> float:
        """The value of a trial of optuna; whole numbers where only whole numbers were written."""
        if not self.is_range:
            return float(trial.suggest_categorical(self.name, list(self.values)))
        low, high = self.values
        if isinstance(low, int) and isinstance(high, int):
            return int(trial.suggest_int(self.name, low, high))
        return float(trial.suggest_float(self.name, low, high, log=low > 0 and high >= _WIDE * low))


def read_dials(written: Sequence[str], arguments: DistillationArguments) -> list[Dial]:
    """Read the texts of a search, and try every value on the arguments of the training.

    Args:
        written: `option=low:high` for a range, `option=a|b|c` for choices.
        arguments: Of the training; not changed.

    Raises:
        ValueError: If a text is none of these, or names an option or a value that the training does not take.

    Example:
        >>> [dial] = read_dials(["learning_rate=1e-5:1e-3"], DistillationArguments("out", report_to="none"))
        >>> dial.name, dial.values, dial.is_range
        ('learning_rate', (1e-05, 0.001), True)
    """
    dials = [_dial(text, arguments) for text in written]
    names = [dial.name for dial in dials]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"space must name each option once, got {name!r} twice.")
    for dial in dials:
        for value in dial.values:
            tried = copy.copy(arguments)
            setattr(tried, dial.name, value)
            tried.check()
            check_training(tried)
    return dials


def _dial(text: str, arguments: DistillationArguments) -> Dial:
    name, equals, rest = text.partition("=")
    numbers = {
        entry.name
        for entry in dataclasses.fields(arguments)
        if entry.init and type(getattr(arguments, entry.name)) in (int, float)
    }
    if not equals or name not in numbers:
        raise ValueError(
            f"space must hold texts such as 'learning_rate=1e-5:3e-4' or 'alpha_layer=0|1' that begin with an option "
            f"of the training that takes a number, got {text!r}.{nearest(name, sorted(numbers))}"
        )
    is_range = ":" in rest
    try:
        values = tuple(_number(each) for each in rest.split(":" if is_range else "|"))
    except ValueError as error:
        raise ValueError(f"space must give {name} numbers, 'low:high' or 'a|b|c', got {text!r}.") from error
    if is_range and (len(values) != 2 or not values[0] < values[1]):
        raise ValueError(f"space must give {name} a range 'low:high' with low below high, got {text!r}.")
    if type(getattr(arguments, name)) is int and not all(isinstance(value, int) for value in values):
        raise ValueError(f"space must give {name} whole numbers, got {text!r}.")
    return Dial(name, values, is_range)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
