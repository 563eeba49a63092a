"""Writes beside each result how it was made, from the first stage to the last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.core.saving import write_json, write_text
from hf_compress.folder_card import FILE as CARD
from hf_compress.folder_card import may_be_replaced
from hf_compress.recipes.jobs import Job, Result
from hf_compress.recipes.state import LINEAGE_FILE


_TITLE = "## How it was made"


def lineage_of(job: Job, inputs: Mapping[str, Any], seconds: float, before: Sequence[Path]) -> list[dict[str, Any]]:
    """List the jobs that made a result, the first one first; each once.

    Args:
        job: The job.
        inputs: What it was made of.
        seconds: How long it took.
        before: The folders of the jobs that it read.

    Returns:
        For each: `name`, `stage`, `options` (models of earlier jobs by their names), `files` (digests of what it
        read), `code` (releases) and `seconds`.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in before:
        for entry in json.loads((folder / LINEAGE_FILE).read_text(encoding="utf-8")):
            found.setdefault(entry["name"], entry)
    options = {name: _written(value) for name, value in job.options.items()}
    own = {
        "name": job.name,
        "stage": job.entry.stage.name,
        "options": options,
        "files": inputs["files"],
        "code": {name: value for name, value in inputs["code"].items() if name != "sources"},
        "seconds": round(seconds, 1),
    }
    return [*found.values(), own]


def _written(value: Any) -> Any:
    """A value for files that others read: of a path on this machine, only its end."""
    if isinstance(value, list):
        return [_written(each) for each in value]
    if isinstance(value, Result):
        return f"{value.job}/{value.rest}" if value.rest else value.job
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_lineage(folder: Path, lineage: Sequence[Mapping[str, Any]]) -> None:
    """Write `lineage.json`, and a section of the README.md unless a person has written that."""
    write_json(folder / LINEAGE_FILE, lineage)
    card = folder / CARD
    if card.is_file() and may_be_replaced(card):
        text = card.read_text(encoding="utf-8").partition(_TITLE)[0].rstrip()
        write_text(card, f"{text}\n\n{lineage_section(lineage)}")


def lineage_section(lineage: Sequence[Mapping[str, Any]]) -> str:
    """Describe in Markdown how a result was made.

    Example:
        >>> code = {"hf_compress": "0.1.0"}
        >>> entry = {"name": "teacher", "stage": "finetune", "options": {"seed": 1}, "code": code, "seconds": 9.0}
        >>> print(lineage_section([entry]).splitlines()[-1])
        1. `teacher`: finetune, `seed: 1` (9 s)
    """
    lines = []
    for place, entry in enumerate(lineage, start=1):
        shown = [f"`{name}: {_short(value)}`" for name, value in entry["options"].items()]
        lines.append(f"{place}. `{entry['name']}`: {', '.join([entry['stage'], *shown])} ({entry['seconds']:.0f} s)")
    releases = ", ".join(f"{name} {version}" for name, version in lineage[-1]["code"].items())
    return (
        "\n".join(
            [_TITLE, "", f"By a recipe of {releases}; `{LINEAGE_FILE}` has the digests of its files.", "", *lines]
        )
        + "\n"
    )


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
