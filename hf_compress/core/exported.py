"""A model that another runtime computes, called as the original is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput


class ExportedModel(nn.Module, ABC):
    """A model whose weights another runtime holds; it computes on the CPU and takes and gives tensors by name.

    Args:
        file: That holds it.
        inputs, outputs: Names, in the runtime's order.
        config: Of the original, for pipelines and tasks.

    Attributes:
        runtime: What computes it.
        numbers: What its weights are stored in: `float32` or `int8`.
        facts: What the export noted beside the file (`export.json`); empty where it was opened by itself.
    """

    runtime: str
    numbers = "float32"

    def __init__(
        self, file: Path, inputs: Sequence[str], outputs: Sequence[str], config: PretrainedConfig | None
    ) -> None:
        super().__init__()
        self.file, self.config = file, config
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.main_input_name = next(iter(self.inputs), "input_ids")
        self.facts: dict[str, Any] = {}
        self.eval()

    def num_bytes(self) -> int:
        """Of the files that hold it."""
        return self.file.stat().st_size

    @abstractmethod
    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The outputs in order, of all `inputs` by name."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def base_model(self) -> ExportedModel:
        return self

    def can_generate(self) -> bool:
        """Pipelines ask; no exported model does."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse to write a text, with the remedy."""
        raise ValueError(
            f"generate must be called on the original, got a model in {self.runtime}: its graph computes a whole text "
            "and has no cache of keys and values. The exported one gives the logits of a text that is there."
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        second_input_ids: Tensor | None = None,
        second_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        return_dict: bool = True,
    ) -> ModelOutput:
        """Compute the outputs of the original.

        Args:
            input_ids, attention_mask, token_type_ids: As the original takes them. A mask that is left out is all ones,
                token types are all zeros.
            second_input_ids, second_attention_mask: The second texts, of models that read pairs separately.
            pixel_values, input_values: Images and sounds.
            return_dict: Must be true; callers of transformers' models say so.

        Returns:
            Tensors by name.

        Raises:
            ValueError: If an input that the model needs is missing, or `return_dict` is false.
        """
        if not return_dict:
            raise ValueError("return_dict must be true: an exported model returns its outputs by name.")
        given = {name: value for name, value in locals().items() if torch.is_tensor(value)}
        outputs = self.compute({name: self._input(name, given) for name in self.inputs})
        result = ModelOutput()  # type: ignore[no-untyped-call]  # of HF
        for name, value in zip(self.outputs, outputs, strict=True):
            result[name] = value
        return result

    def _input(self, name: str, given: dict[str, Tensor]) -> Tensor:
        if name in given:
            return given[name].cpu()
        if "input_ids" in given and name in ("attention_mask", "token_type_ids"):
            return torch.full_like(given["input_ids"], int(name == "attention_mask"))
        raise ValueError(f"The exported model must have the inputs {', '.join(self.inputs)}; {name} is missing.")
