"""Models that `torch.export` recorded, called as their originals are."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.errors import first_line
from hf_compress.core.exported import ExportedModel
from hf_compress.export.graph import output_names, output_values, record_model
from hf_compress.export.inputs import Inputs


FILE = "model.pt2"


class RecordedModel(ExportedModel):
    """A recorded model that is called as the original is; PyTorch computes it on the CPU, without the original's code.

    Args:
        file: That `torch.export.save` wrote.
        config: Of the original.

    Raises:
        ValueError: If PyTorch cannot read the file.
    """

    runtime = "torch.export"

    def __init__(self, file: Path, config: PretrainedConfig | None = None) -> None:
        try:
            _refuse_pickles(file)
            program = torch.export.load(file)
        except Exception as error:
            # A broken file is reported as whatever it breaks first.
            raise ValueError(f"torch.export cannot open {str(file)!r}: {first_line(error)}") from error
        super().__init__(file, [str(name) for name in program.graph_signature.user_inputs], [], config)
        # Recorded modules have no train(), which callers switch: it must not become a child.
        self._held = (program.module(),)

    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            found = self._held[0](**inputs)
        self.outputs = output_names(found)
        return output_values(found)


def _refuse_pickles(file: Path) -> None:
    """Raise `ValueError` if an archive holds pickles, which can run any code when PyTorch reads them."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            named = entry.filename.endswith("_config.json") and b'"use_pickle": true' in archive.read(entry)
            if named or (entry.filename.endswith((".pt", ".pkl")) and entry.file_size):
                raise ValueError(f"it holds a pickle ({entry.filename}).")


def write_recorded(model: PreTrainedModel, inputs: Inputs, names: Sequence[str], file: Path) -> None:
    """Write a model as `torch.export` records it; arguments and errors as for `write_graph`."""
    program = record_model(model, inputs)
    # They would be stored as a pickle, and nobody needs them.
    program.example_inputs = None
    torch.export.save(program, file)
