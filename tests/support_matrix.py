"""Which trainer runs under which engine: `python -m tests.support_matrix` writes a table of docs/support.md.

A test runs one short training for each cell and compares with the word that stands here: `tests/test_sharded.py` for
FSDP2, `tests/test_support_matrix.py` for the rest.
"""

import sys
from pathlib import Path

from tests.support_rows import ROWS


PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
BEGIN = "<!-- printed by `python -m tests.support_matrix` -->"
END = "<!-- end of the table of engines -->"

COLUMNS = ("DDP", "FSDP2", "DeepSpeed", "torch.compile", "fp16", "bf16", "PEFT student", "streaming")
EXCEPTIONS = {
    "`JointTeacherTrainer`": {"FSDP2": "refused"},
    "`ProximalTrainer`": {"FSDP2": "refused"},
    "`WeightPruningCallback`, stock `Trainer`": {"FSDP2": "refused", "PEFT student": "refused"},
    "`ThresholdAnnealingCallback`, `StageSwitchCallback`": {"PEFT student": "refused"},
}
MATRIX = {
    row: dict.fromkeys(COLUMNS, "yes") | {"DeepSpeed": "refused", "fp16": "on a GPU"} | EXCEPTIONS.get(row, {})
    for row in ROWS
}


def table():
    """The cells as Markdown."""
    lines = [f"| trained with | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join([*lines, *(f"| {row} | {' | '.join(cells.values())} |" for row, cells in MATRIX.items())])


def printed(text):
    """What stands between the marks in a text."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main():
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    sys.stdout.write(printed(PAGE.read_text()) + "\n")


if __name__ == "__main__":
    main()
