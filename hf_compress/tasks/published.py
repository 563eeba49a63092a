"""Published tasks: where the hub has them and what their columns are called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published task.

    Args:
        kind: Its name in the table of kinds.
        path, configuration: On the hub.
        columns: Where its texts are; empty where the kind knows.
        num_labels: How many labels it has; 1 is regression, None where there are none.
    """

    kind: str
    path: str
    configuration: str | None
    columns: tuple[str, ...] = ()
    num_labels: int | None = None


def _glue(name: str, columns: tuple[str, ...], num_labels: int = 2) -> Published:
    return Published("sequence-classification", "nyu-mll/glue", name, columns, num_labels)


PUBLISHED = {
    "cola": _glue("cola", ("sentence",)),
    "imdb": Published("sequence-classification", "stanfordnlp/imdb", None, ("text",), 2),
    "mnli": _glue("mnli", ("premise", "hypothesis"), 3),
    "mrpc": _glue("mrpc", ("sentence1", "sentence2")),
    "qnli": _glue("qnli", ("question", "sentence")),
    "qqp": _glue("qqp", ("question1", "question2")),
    "rte": _glue("rte", ("sentence1", "sentence2")),
    "sst2": _glue("sst2", ("sentence",)),
    "stsb": _glue("stsb", ("sentence1", "sentence2"), 1),
}
