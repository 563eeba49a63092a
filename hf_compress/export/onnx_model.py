"""Exported models in ONNX Runtime, called as their originals are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.generic import ModelOutput

from hf_compress.core.errors import first_line


# Files of an exported folder.
GRAPH, SMALL_GRAPH, REPORT = "model.onnx", "model_int8.onnx", "export.json"
INSTALL = "pip install 'hf_compress[onnx]'"


def open_session(file: str | os.PathLike[str], threads: int | None = None) -> Any:
    """Open an ONNX file in ONNX Runtime, on the CPU.

    Args:
        file: The file.
        threads: That compute one operation; None: as many as torch uses.

    Raises:
        ValueError: If ONNX Runtime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX Runtime must be installed to run an exported model: {INSTALL}.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Warnings are about the runtime's own rewriting of graphs.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Its errors have no class of their own in Python.
        raise ValueError(f"ONNX Runtime cannot open {str(file)!r}: {first_line(error)}") from error


class OnnxModel(nn.Module):
    """An exported model that is called as the original is, with tensors by name; ONNX Runtime computes it on the CPU.

    Args:
        file: An ONNX file whose outputs have the names of the original's.
        config: Of the original, for pipelines and tasks.
        threads: That compute one operation; None: as many as torch uses now.

    Raises:
        ValueError: If ONNX Runtime is not installed, or cannot read the file.

    Example:
        >>> model = OnnxModel.from_pretrained("exported", int8=True)  # doctest: +SKIP
        >>> model(**tokenizer(["a text"], return_tensors="pt")).logits  # doctest: +SKIP
        tensor([[-1.2031,  1.4410]])
    """

    main_input_name = "input_ids"

    def __init__(
        self, file: str | os.PathLike[str], config: PretrainedConfig | None = None, threads: int | None = None
    ) -> None:
        super().__init__()
        self.session = open_session(file, threads)
        self.config = config
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.outputs = [entry.name for entry in self.session.get_outputs()]
        self.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], int8: bool = False, threads: int | None = None
    ) -> OnnxModel:
        """Open a folder that `export_onnx` wrote.

        Args:
            folder: The folder.
            int8: Whether to open the graph with weights of eight bits.
            threads: As for the class.

        Raises:
            ValueError: If the folder has no such graph.
        """
        file = Path(folder, SMALL_GRAPH if int8 else GRAPH)
        if not file.is_file():
            asked = " with int8" if int8 and Path(folder, GRAPH).is_file() else ""
            raise ValueError(f"{str(folder)!r} has no {file.name}: export the model{asked} first.")
        return cls(file, AutoConfig.from_pretrained(folder), threads)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def base_model(self) -> OnnxModel:
        return self

    def can_generate(self) -> bool:
        """Pipelines ask; no exported graph does."""
        return False

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
            ValueError: If an input that the graph needs is missing, or `return_dict` is false.
        """
        if not return_dict:
            raise ValueError("return_dict must be true: an exported model returns its outputs by name.")
        given = {name: value for name, value in locals().items() if torch.is_tensor(value)}
        outputs = self.session.run(None, {name: self._input(name, given).numpy() for name in self.inputs})
        result = ModelOutput()  # type: ignore[no-untyped-call]  # of HF
        for name, value in zip(self.outputs, outputs, strict=True):
            result[name] = torch.from_numpy(value)
        return result

    def _input(self, name: str, given: dict[str, Tensor]) -> Tensor:
        if name in given:
            return given[name].cpu()
        if "input_ids" in given and name in ("attention_mask", "token_type_ids"):
            return torch.full_like(given["input_ids"], int(name == "attention_mask"))
        raise ValueError(f"The exported model must have the inputs {', '.join(self.inputs)}; {name} is missing.")
