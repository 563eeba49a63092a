"""What a machine with a GPU shows in nine minutes, in one result file.

    python benchmarks/device.py --output device.json

Four parts, each in a process of its own, so that what one does to the device ends with it: the tests marked `gpu`; the
trainers in half precision, their throughput, peak memory and step against a loop by hand; 2:4 weights against dense
ones; pruned tokens and pruned structure against the dense model. All models have random weights. What fails or runs
out of its time is noted in the file, and the rest goes on. `--device cpu --tiny` runs the same code on tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
# A checkout need not be installed.
sys.path.insert(0, str(ROOT))

from device_bench import Bench  # noqa: E402
from device_parts import PARTS  # noqa: E402
from header import commit, machine  # noqa: E402

from hf_compress.core.saving import write_json  # noqa: E402


# Seconds of each part of nine minutes, starts included.
SECONDS = {"tests": 170, "training": 140, "two_of_four": 80, "pruned": 110}
# Beyond its time a part is killed.
GRACE = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", default="device.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="Of all parts together.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models, few repeats.")
    parser.add_argument("--commit", help="Where there is no git.")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def card() -> str:
    """Name, driver and memory as the driver gives them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def commit_of(given: str | None) -> str:
    try:
        return given or commit()
    except OSError:
        return "unknown"


def run_here(args: argparse.Namespace) -> None:
    """Run one part in this process; the file is written after every measurement."""
    [name] = args.parts
    bench = Bench(args.device, args.tiny, 60 * args.minutes, lambda results: write_json(args.output, results))
    PARTS[name](bench)


def run_apart(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own."""
    began, folder = time.perf_counter(), tempfile.mkdtemp()
    file = Path(folder, "results.json")
    command = [sys.executable, __file__, "--alone", "--parts", name, "--device", args.device, "--output", str(file)]
    command += ["--minutes", str(seconds / 60), *(["--tiny"] if args.tiny else [])]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found: dict[str, Any] = {"ended": "done"}
    try:
        outcome = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
            stderr=subprocess.PIPE,
            text=True,
            timeout=seconds + GRACE,
        )
        if outcome.returncode:
            found = {"ended": f"exit code {outcome.returncode}", "error": outcome.stderr[-4000:]}
    except subprocess.TimeoutExpired:
        found = {"ended": f"killed after {seconds + GRACE:.0f} seconds"}
    except OSError:
        found = {"ended": "not started", "error": traceback.format_exc()}
    results = json.loads(file.read_text()) if file.is_file() else {}
    return {**found, "seconds": round(time.perf_counter() - began, 1), "results": results}


def failures(parts: dict[str, Any]) -> list[str]:
    """What did not end well."""
    ended = [f"{name}: {part['ended']}" for name, part in parts.items() if part["ended"] != "done"]
    inside = [
        f"{name}, {entry}: {found['error'].strip().splitlines()[-1]}"
        for name, part in parts.items()
        for entry, found in part["results"].items()
        if "error" in found
    ]
    return ended + inside


def main() -> int:
    args = parse()
    if args.alone:
        run_here(args)
        return 0
    began, report = time.perf_counter(), {"card": card(), "commit": commit_of(args.commit)}
    report |= {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "environment": machine(), "parts": {}}
    for name in args.parts:
        left = 60 * args.minutes - (time.perf_counter() - began) - GRACE
        if left < GRACE:
            report["parts"][name] = {"ended": "no time left", "seconds": 0.0, "results": {}}
        else:
            print(f"== {name}", flush=True)
            report["parts"][name] = run_apart(name, args, min(left, SECONDS[name] * args.minutes / 9))
        report["seconds"] = round(time.perf_counter() - began, 1)
        write_json(args.output, report)
    print(f"== {report['card']}; commit {report['commit']}; {report['seconds']:.0f} seconds; {args.output}")
    for name, part in report["parts"].items():
        print(f"{name}: {part['ended']}, {part['seconds']:.0f} seconds")
        for entry, found in part["results"].items():
            if "line" in found:
                print(f"  {entry}: {found['line']}")
    wrong = failures(report["parts"])
    print("\n".join(f"NOT WELL: {line}" for line in wrong) or "all well")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
