"""What results say of the machine: processor, instruction sets, threads, load."""

import json

import pytest
import torch

from hf_compress.report import machine


X86 = """processor\t: 0
model name\t: Some Server 9000
flags\t\t: fpu sse2 avx avx2 fma {}

processor\t: 1
model name\t: Another
flags\t\t: avx512f
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve i8mm bf16\n"


@pytest.mark.parametrize(("text", "processor", "sets"), [
    (X86.format(""), "Some Server 9000", ["AVX2"]),
    (X86.format("avx_vnni"), "Some Server 9000", ["AVX2", "VNNI"]),
    (X86.format("avx512f avx512_vnni avx512_bf16"), "Some Server 9000", ["AVX2", "AVX512", "VNNI"]),
    (X86.format("avx512f avx512_vnni amx_bf16 amx_tile amx_int8"), "Some Server 9000",
     ["AVX2", "AVX512", "VNNI", "AMX"]),
    (ARM, "named by the system", ["NEON", "SVE"]),
    (None, "named by the system", None),
])  # fmt: skip
def test_instruction_sets(monkeypatch, tmp_path, text, processor, sets):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "processor", lambda: "named by the system")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    place = machine.environment()
    assert (place["processor"], place["instruction_sets"]) == (processor, sets)
    line = machine.describe(place)
    assert line.startswith(f"{processor}, {place['cores']} cores, {' '.join(sets or ['instruction sets unknown'])} (")


def test_this_machine(monkeypatch):
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    place = machine.environment()
    assert json.loads(json.dumps(place)) == place
    assert place["torch_kernels"] == torch.backends.cpu.get_cpu_capability()
    assert place["instruction_limits"]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert place["threads"] == torch.get_num_threads()
    assert place["load_average_1min"] is None or place["load_average_1min"] >= 0
    assert f"(torch uses {place['torch_kernels']})" in machine.describe(place)
