"""GPTQ of one matrix against the published loop, as a careful person would write it: time, and codes that differ.

    python benchmarks/gptq.py --out benchmarks/results/gptq.json

Both take turns in one run, on the same weights and second moments. The loop treats one column after the other in
blocks of 128, updates the columns behind it in the block, and the columns behind the block in one product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from header import machine
from torch import Tensor

from hf_compress.core.saving import write_json
from hf_compress.methods.weight_quantization.rounding import RoundingOptions, prepare_inputs, round_by_inputs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=-1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    return parser.parse_args()


def grid_of(part: Tensor, top: int) -> tuple[Tensor, Tensor]:
    low, high = part.min(1)[0].clamp(max=0), part.max(1)[0].clamp(min=0)
    scale = (high - low) / top
    return scale.unsqueeze(1), torch.round(-low / scale).unsqueeze(1)


@torch.no_grad()
def by_hand(weight: Tensor, hessian: Tensor, bits: int, group_size: int, block: int = 128) -> Tensor:
    """[R, C] codes, by the published algorithm."""
    work, damped, columns, top = weight.clone(), hessian.clone(), weight.shape[1], 2**bits - 1
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes, losses = torch.zeros_like(work), torch.zeros_like(work)
    scale, zero = grid_of(work, top)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = work[:, start:stop].clone(), torch.zeros(len(work), stop - start)
        inside = factor[start:stop, start:stop]
        for i in range(stop - start):
            if group_size != -1 and (start + i) % group_size == 0:
                scale, zero = grid_of(work[:, start + i : start + i + group_size], top)
            column = part[:, i]
            code = torch.clamp(torch.round(column.unsqueeze(1) / scale) + zero, 0, top)
            value = (scale * (code - zero)).flatten()
            codes[:, start + i] = code.flatten()
            losses[:, start + i] = (column - value) ** 2 / inside[i, i] ** 2
            error = (column - value) / inside[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(inside[i, i:].unsqueeze(0))
            errors[:, i] = error
        work[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return codes.to(torch.uint8)


def main() -> None:
    args = parse()
    load = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(0)
    size = args.size
    weight = torch.randn(size, size, generator=generator)
    sizes = torch.rand(size, generator=generator).exp()
    inputs = torch.randn(3 * size, size, generator=generator) * sizes
    hessian = inputs.T @ inputs * (2 / 100)
    options = RoundingOptions(args.bits, args.group_size)
    times: dict[str, list[float]] = {"by hand": [], "here": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        expected = by_hand(weight, hessian, args.bits, args.group_size)
        times["by hand"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = round_by_inputs(weight, prepare_inputs(hessian, options), options).codes
        times["here"].append(time.perf_counter() - start)
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    fastest = min(times["by hand"]) / min(times["here"])
    results = {
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine(load),
        "seconds": {name: [round(t, 4) for t in values] for name, values in times.items()},
        "times_as_fast": {"median": statistics.median(ratios), "of the fastest runs": fastest},
        "codes": expected.numel(),
        "codes_that_differ": int((expected != found).sum()),
    }
    for name in ("seconds", "times_as_fast", "codes", "codes_that_differ"):
        print(name, results[name])
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
