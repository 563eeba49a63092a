"""Describes the machine of a measurement: processor, instruction sets, threads and load."""

from __future__ import annotations

import os
import platform
import time
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
_CPU_TIMES = Path("/proc/stat")
# Cores that the system itself keeps busy at most; what others use beyond that shows in the times.
_IDLE_CORES = 0.1


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
        "load_average_1min": _load_average(),
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


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started; None if the system does not report them."""
    try:
        # "cpu", user, nice, system, idle, waiting, interrupts, soft interrupts, stolen by other guests.
        ticks = [int(part) for part in _CPU_TIMES.read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = ticks
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


class OtherWork:
    """What other processes, and other guests of the same hardware, did to a machine while something was measured.

    Example:
        >>> others = OtherWork()
        >>> sorted(others.until_now())
        ['cores_used_by_others', 'idle', 'load_average_after', 'load_average_before']
    """

    def __init__(self) -> None:
        self._load = _load_average()
        self._busy, self._own, self._clock = _busy_seconds(), _own_seconds(), time.perf_counter()

    def until_now(self) -> dict[str, Any]:
        """Plain JSON of the time since this object was made.

        Returns:
            `cores_used_by_others`: how many cores worked for anybody else on average. `idle`: whether that was at most
            0.1; both None where the system does not say (it does on Linux). `load_average_before` and
            `load_average_after`: processes that wanted a core in the last minute, this one among them.
        """
        wall, busy, others = time.perf_counter() - self._clock, _busy_seconds(), None
        if self._busy is not None and busy is not None and busy > 0:
            used = busy - self._busy - (_own_seconds() - self._own)
            others = round(max(0.0, used) / wall, 3)
        return {
            "load_average_before": self._load,
            "load_average_after": _load_average(),
            "cores_used_by_others": others,
            "idle": None if others is None else others <= _IDLE_CORES,
        }


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def idleness(found: dict[str, Any]) -> str:
    """What `OtherWork.until_now` found, in a few words; nothing where the machine was idle.

    Example:
        >>> idleness({"idle": False, "cores_used_by_others": 0.83})
        'not idle: others used 0.83 cores'
    """
    if found["idle"]:
        return ""
    if found["idle"] is None:
        return "idle or not: unknown"
    return f"not idle: others used {found['cores_used_by_others']:.2f} cores"
