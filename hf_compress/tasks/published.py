"""Published tasks: where the hub has them and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published task.

    Args:
        kind: Its name in the table of kinds.
        path, configuration: On the hub.
        columns: Where its texts are; empty where the kind knows.
        files: Split -> file on the hub, where the whole would be too much.
        num_labels: How many labels it has; 1 is regression, None where there are none.
        between: What stands between the rows of a running text.
        measured: The split that language models are measured on, where it is not validation.
        documents, windows: How many rows and windows of that split are measured; None: all.
    """

    kind: str
    path: str
    configuration: str | None
    columns: tuple[str, ...] = ()
    num_labels: int | None = None
    files: Mapping[str, str] | None = None
    between: str = "\n\n"
    measured: str | None = None
    documents: int | None = None
    windows: int | None = None


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
    "squad": Published("question-answering", "rajpurkar/squad", None),
    "stsb": _glue("stsb", ("sentence1", "sentence2"), 1),
    "c4": Published(
        "language-modeling",
        "allenai/c4",
        None,
        # The parts that papers on the compression of language models use.
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        between=" ",
        documents=1100,
        windows=256,
    ),
    "conll2003": Published("token-classification", "eriktks/conll2003", None),
    "ptb": Published("language-modeling", "ptb-text-only/ptb_text_only", None, between=" ", measured="test"),
    "wikitext2": Published("language-modeling", "Salesforce/wikitext", "wikitext-2-raw-v1", measured="test"),
}
