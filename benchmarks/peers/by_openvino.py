"""OpenVINO: the dense model as it is, with weights of eight bits, and all in eight bits as NNCF calibrates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import openvino
import torch
from transformers import PretrainedConfig

from benchmarks.peers.setting import Setting
from hf_compress.export.openvino_model import OpenvinoModel


# NNCF's default.
EXAMPLES = 300
SETTINGS = (
    "openvino.convert_model of the PyTorch model; nncf.compress_weights INT8_ASYM; nncf.quantize with "
    f"ModelType.TRANSFORMER on {EXAMPLES} training sentences; computed in what OpenVINO chooses"
)
EXPORTED = False
FLOAT, WEIGHTS, INT8 = "float.xml", "int8_weights.xml", "int8.xml"


class OpenvinoAlone(OpenvinoModel):
    """As OpenVINO computes by itself: in half precision where the processor has matrix units for it."""

    def __init__(self, file: Path, config: PretrainedConfig | None = None, threads: int | None = None) -> None:
        super().__init__(file, config, threads)
        settings = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        self._compiled = openvino.Core().compile_model(str(file), "CPU", settings)


def make(setting: Setting, folder: Path) -> dict[str, openvino.Model]:
    example = setting.inputs(2)[0]
    with torch.no_grad():
        found = openvino.convert_model(
            setting.open(), example_input=example, input=[(name, [-1, -1]) for name in example]
        )
    openvino.save_model(found, folder / FLOAT, compress_to_fp16=False)
    sentences = [{name: value.numpy() for name, value in batch.items()} for batch in setting.inputs(EXAMPLES, 1)]
    read = openvino.Core().read_model
    made = {
        WEIGHTS: nncf.compress_weights(read(folder / FLOAT), mode=nncf.CompressWeightsMode.INT8_ASYM),
        INT8: nncf.quantize(
            read(folder / FLOAT), nncf.Dataset(sentences), model_type=nncf.ModelType.TRANSFORMER, subset_size=EXAMPLES
        ),
    }
    for name, model in made.items():
        openvino.save_model(model, folder / name)
    return made


def opened(setting: Setting, folder: Path, made: dict[str, openvino.Model]) -> dict[str, Any]:
    found: dict[str, Any] = {"from_pretrained": False, "error": "files of OpenVINO"}
    for name, model in made.items():
        again, compiled = OpenvinoAlone(folder / name), openvino.Core().compile_model(model, "CPU")
        found[name] = max(
            float(abs(again(**x).logits.numpy() - compiled({k: v.numpy() for k, v in x.items()})["logits"]).max())
            for x in setting.inputs(32)
        )
    return found
