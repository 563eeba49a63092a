"""Sparse kernels that torch has on the CPU against the dense product, on linear layers that are 90 % zero.

    python benchmarks/sparse_kernels.py --threads 1 --out benchmarks/results/sparse_kernels.json

Every kernel computes `x W^T + b` for the same random x, W, b in float32 and is checked against `F.linear`. Kernels
take turns; speed-ups are ratios of medians, and of the fastest rounds, which other load disturbs less. Kernels ten
times slower than dense in their first runs are timed no more, and those that refuse are named with torch's reason.
`accelerate_for_inference` uses `csr`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from header import arguments_of, commit, machine
from torch import Tensor

from hf_compress.core.saving import write_json


BLOCKS = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 16))
HOPELESS = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768], help="hidden sizes; FFN is four times")
    parser.add_argument("--tokens", type=int, nargs="+", default=[25, 128, 256, 1024])
    parser.add_argument("--patterns", nargs="+", default=["1x1", "4x1"], help="blocks of outputs x inputs")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="goes into the result, e.g. what else ran on the machine")
    parser.add_argument("--out")
    return parser.parse_args()


def pruned_weight(outputs: int, inputs: int, pattern: str, sparsity: float) -> Tensor:
    """[outputs, inputs] random values; exactly floor(units * sparsity) units of the pattern are zero."""
    rows, columns = map(int, pattern.split("x"))
    units = outputs // rows * (inputs // columns)
    keep = torch.ones(units)
    keep[torch.randperm(units)[: int(units * sparsity)]] = 0
    mask = keep.view(outputs // rows, inputs // columns).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.randn(outputs, inputs) / inputs**0.5 * mask


def kernels_of(weight: Tensor, bias: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> function of [tokens, inputs] that gives [tokens, outputs]; `csr` as a view with tokens as columns."""
    csr, column = weight.to_sparse_csr(), bias[:, None]
    kernels: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda x: F.linear(x, weight, bias),
        "csr": lambda x: torch.addmm(column, csr, x.t()).t(),
        "csr_contiguous": lambda x: torch.addmm(column, csr, x.t()).t().contiguous(),
        "csr_linear": lambda x: F.linear(x, csr, bias),
    }
    for rows, columns in BLOCKS:
        bsr = weight.to_sparse_bsr((rows, columns))
        kernels[f"bsr_{rows}x{columns}"] = lambda x, bsr=bsr: torch.addmm(column, bsr, x.t()).t()
    return kernels


def seconds(kernel: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    kernel(x)
    return time.perf_counter() - start


@torch.no_grad()
def compare(kernels: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, Any]:
    """Median seconds and speed-up of each kernel on one input."""
    expected, refused, first, slow = kernels["dense"](x), {}, {}, {}
    for name, kernel in kernels.items():
        try:
            error = float((kernel(x) - expected).abs().max())
        except RuntimeError as problem:
            refused[name] = str(problem).splitlines()[0]
            continue
        assert error < 1e-4, f"{name} is wrong by {error}"
        first[name] = min(seconds(kernel, x) for _ in range(3))
        if first[name] > HOPELESS * first["dense"]:
            slow[name] = first.pop(name)
    times: dict[str, list[float]] = {name: [] for name in first}
    for number in range(rounds):
        names = list(first) if number % 2 else list(reversed(first))
        for name in names:
            times[name].append(seconds(kernels[name], x))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    return {
        "median_seconds": medians,
        "speedup": {name: medians["dense"] / value for name, value in medians.items()},
        "fastest_seconds": fastest,
        "fastest_speedup": {name: fastest["dense"] / value for name, value in fastest.items()},
        "hopeless_speedup": {name: first["dense"] / value for name, value in slow.items()},
        "refused": refused,
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore")
    load, results = os.getloadavg()[0], []
    for width in args.widths:
        for outputs, inputs in ((width, width), (4 * width, width), (width, 4 * width)):
            for pattern in args.patterns:
                weight, bias = pruned_weight(outputs, inputs, pattern, args.sparsity), torch.randn(outputs)
                kernels = kernels_of(weight, bias)
                for tokens in args.tokens:
                    found = compare(kernels, torch.randn(tokens, inputs), args.rounds)
                    results.append(
                        {"outputs": outputs, "inputs": inputs, "pattern": pattern, "tokens": tokens, **found}
                    )
                    ratios = {
                        name: (found["speedup"][name], value) for name, value in found["fastest_speedup"].items()
                    }
                    line = ", ".join(f"{name} {a:.2f} ({b:.2f})" for name, (a, b) in ratios.items() if name != "dense")
                    print(
                        f"{inputs:5d} -> {outputs:5d} {pattern} {tokens:5d} tokens: dense "
                        f"{1e3 * found['median_seconds']['dense']:.2f} ms; times as fast, median (fastest): {line}",
                        flush=True,
                    )
    for name, reason in results[0]["refused"].items():
        print(f"{name}: {reason}")
    print(f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    if args.out:
        report = {
            "arguments": arguments_of(args),
            "commit": commit(),
            "results": results,
            "environment": machine(load),
        }
        write_json(args.out, report)


if __name__ == "__main__":
    main()
