"""Where something was measured: processor, instruction sets, threads and load, which ratios of times depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


# Instruction set -> the flags of /proc/cpuinfo that announce it (the last two rows: on ARM).
_FLAGS = {
    "AVX2": {"avx2"},
    "AVX512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_tile"},
    "NEON": {"asimd"},
    "SVE": {"sve"},
}
# Variables that keep kernels from instruction sets that the processor has.
_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
_CPUINFO = Path("/proc/cpuinfo")


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        first = _CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def environment() -> dict[str, Any]:
    """Hardware, instruction sets and versions that times depend on, with the machine's load at this moment.

    Returns:
        Plain JSON. `instruction_sets` is what the processor has of AVX2, AVX512, VNNI, AMX, NEON and SVE (None where
        the system does not say), `torch_kernels` the set that torch's own kernels use, `instruction_limits` the
        variables that were set to restrict them, `load_average_1min` the number of processes that wanted a core.
    """
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name, signs in _FLAGS.items() if signs & flags] if flags else None,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "instruction_limits": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe(place: dict[str, Any]) -> str:
    """One line on the hardware of an `environment()`, as it stands under tables.

    Example:
        >>> place = {"processor": "a processor", "cores": 2, "instruction_sets": ["AVX2", "AVX512"]}
        >>> place |= {"torch_kernels": "AVX2", "accelerator": None, "system": "Linux x86_64", "load_average_1min": 0.5}
        >>> describe(place)
        'a processor, 2 cores, AVX2 AVX512 (torch uses AVX2); Linux x86_64; load average 0.5 when it began'
    """
    sets = " ".join(place["instruction_sets"] or ["instruction sets unknown"])
    processor = f"{place['processor']}, {place['cores']} cores, {sets} (torch uses {place['torch_kernels']})"
    machine = f"{place['accelerator']} beside {processor}" if place["accelerator"] else processor
    return f"{machine}; {place['system']}; load average {place['load_average_1min']} when it began"
