"""Writes values of a report into HTML so that each of them says where in `report.json` it stands.

A place is the path to a value, with dots: `models.1.latency.0.p50`. The tests read it back.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from hf_compress.report.markdown import megabytes, setting, short


def _seconds(value: float) -> str:
    return f"{1e3 * value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


# How a value reads -> what writes it.
FORMATS: dict[str, Callable[[Any], str]] = {
    "count": short,
    "fraction": "{:.4f}".format,
    "megabytes": megabytes,
    "milliseconds": _seconds,
    "percent": _percent,
    "rate": "{:.1f}".format,
    "setting": setting,
    "signed": _signed,
    "text": str,
    "times": "{:.2f}x".format,
}


class Facts:
    """The values of a report, by their places.

    Args:
        report: From `build_report`.

    Example:
        >>> Facts({"models": [{"mac_ratio": 0.5}]}).write("models.0.mac_ratio", "percent")
        '<data data-from="models.0.mac_ratio" value="0.5">50.0 %</data>'
    """

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report

    def at(self, place: str) -> Any:
        """The value at a place; None where it ends early."""
        value: Any = self._report
        for part in place.split("."):
            if isinstance(value, list):
                value = value[int(part)] if int(part) < len(value) else None
            elif isinstance(value, dict):
                value = value.get(part)
            else:
                return None
        return value

    def shown(self, place: str, how: str = "text") -> str:
        """A value as it reads, escaped; a dash where there is none."""
        value = self.at(place)
        return "-" if value is None else html.escape(FORMATS[how](value))

    def attributes(self, *places: str) -> str:
        """The attributes that say where the values of an element stand."""
        # Points of a plot have two places; what they show is not a text.
        value = f' value="{html.escape(repr(self.at(places[0])))}"' if len(places) == 1 else ""
        return f'data-from="{html.escape(" ".join(places))}"{value}'

    def write(self, place: str, how: str = "text") -> str:
        """A value as an element."""
        return "-" if self.at(place) is None else f"<data {self.attributes(place)}>{self.shown(place, how)}</data>"
