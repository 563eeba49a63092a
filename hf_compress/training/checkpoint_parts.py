"""State that a resumed training needs besides the files that `Trainer` writes into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class CheckpointPart(Protocol):
    """State that is saved into every checkpoint of a training and read when the training resumes."""

    def save(self, checkpoint: Path, process: int, shared: bool) -> None:
        """Write it into the folder of a checkpoint.

        Args:
            checkpoint: An existing folder.
            process: The number of this process.
            shared: Whether this process writes what all of them share.
        """

    def load(self, checkpoint: Path, process: int) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: If it is not there, or cannot be read.
        """
