"""Where the tests of half precision run: on a GPU (`pytest -m gpu`), and with the same code on the CPU."""

import pytest
import torch
from accelerate import Accelerator


def scale_on_the_cpu(monkeypatch):
    """Let fp16 be fp16 on the CPU too: torch can compute and scale in it there, accelerate leaves it out."""
    begin = Accelerator.__init__

    def scaled(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16" and self.scaler is None:
            self.native_amp, self.scaler = True, torch.amp.GradScaler(self.device.type)

    monkeypatch.setattr(Accelerator, "__init__", scaled)


def places(*marks):
    """A fixture that gives the devices, on each of which fp16 works.

    Args:
        marks: Of the tests on the CPU.
    """

    @pytest.fixture(params=[pytest.param("cpu", marks=marks), pytest.param("cuda", marks=pytest.mark.gpu)])
    def place(request, monkeypatch):
        scale_on_the_cpu(monkeypatch)
        return request.param

    return place


def training_on(place, precision="fp32"):
    """Training arguments for a device and a precision."""
    return {"use_cpu": place == "cpu", **({} if precision == "fp32" else {precision: True})}
