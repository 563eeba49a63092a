"""Seconds that `import hf_compress` adds to `import transformers`, in fresh processes that take turns.

python benchmarks/import_time.py --out benchmarks/results/import_time.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from header import machine

from hf_compress.core.saving import write_json


PROGRAMS = {
    "transformers": "import transformers",
    "transformers, then hf_compress": "import transformers; import hf_compress",
    "a model class": "from transformers import BertModel",
    "a model class, then hf_compress": "from transformers import BertModel; import hf_compress",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(args.repeats):
        for name, program in PROGRAMS.items():
            command = [sys.executable, "-c", TIMED.format(program)]
            seconds[name].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:34s} {value:.3f} s")
    if args.out:
        write_json(args.out, {"medians": medians, "seconds": seconds, "environment": machine()})


if __name__ == "__main__":
    main()
