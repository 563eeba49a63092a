"""Remembers in a folder how far a long computation got, so that it goes on there after it was killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hf_compress.core.saving import write_json, write_tensors


class Unfinished:
    """Notes and tensors of a computation that is not finished, in a folder of their own.

    Args:
        folder: Of the notes; made if it is not there.
        inputs: What the result depends on, as JSON holds it.

    Raises:
        ValueError: If the folder has notes of a computation with other inputs; names the first that differs.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = folder
        # As it is read back.
        inputs, before = json.loads(json.dumps(inputs)), self.noted("inputs")
        if before is None:
            self.note("inputs", inputs)
            return
        changed = [name for name in inputs if inputs[name] != before.get(name)]
        if changed:
            raise ValueError(
                f"output_dir {str(folder.parent)!r} holds the unfinished work of a run with other inputs "
                f"({changed[0]} differs): name another folder, or remove {folder.name} in it to begin anew."
            )

    def note(self, name: str, value: Any) -> None:
        """Keep a value, as JSON holds it, under a name."""
        write_json(self.folder / f"{name}.json", value)

    def noted(self, name: str) -> Any:
        """The value of a name; None where there is none."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def keep(self, name: str, position: int, tensors: list[Tensor]) -> None:
        """Keep how far a walk of a name got, with its tensors, in place of those before."""
        numbered = {f"{number:06d}": tensor for number, tensor in enumerate(tensors)}
        write_tensors(self._states(name), numbered, {"position": str(position)})

    def kept(self, name: str) -> tuple[int, list[Tensor]]:
        """How far a walk of a name got, and its tensors; 0 and nothing if it never began."""
        if not self._states(name).is_file():
            return 0, []
        with safe_open(self._states(name), framework="pt") as saved:
            # Copies, which begin in memory as other results do.
            return int(saved.metadata()["position"]), [saved.get_tensor(each).clone() for each in sorted(saved.keys())]

    def _states(self, name: str) -> Path:
        return self.folder / f"states-{name}.safetensors"

    def forget(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
