"""Time and memory of linear attention against dense sdpa attention, by input length.

    python benchmarks/linear_attention.py --out benchmarks/results/linear_attention.json

Two things are timed, everything interleaved in one run: the attention core alone (dense: one call of
`scaled_dot_product_attention`; linear: two projections along time and the same call on k slots), and a whole encoder.
Inputs have no padding. Weights are random: values do not matter for the time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time

import torch
import torch.nn.functional as F
from header import arguments_of, commit, machine
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384, help="MiniLM's width.")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--slots", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out")
    parser.add_argument("--plot", help="PNG file.")
    return parser.parse_args()


def core_seconds(
    models: dict[str, PreTrainedModel], dense_heads: int, lengths: list[int], batch: int, repeats: int, device: str
) -> dict[tuple[str, int], list[float]]:
    """Seconds of the dense core and of each linear one at every length, all in turns: machines change their speed."""
    width = layers_of(next(iter(models.values())))[0].attention_out.in_features
    calls = {}
    for length in lengths:
        states = [
            torch.randn(batch, length, dense_heads, width // dense_heads, device=device).transpose(1, 2)
            for _ in range(3)
        ]
        scaling = states[0].shape[-1] ** -0.5

        def dense(states=states, scaling=scaling) -> torch.Tensor:
            return F.scaled_dot_product_attention(*states, scale=scaling).transpose(1, 2).contiguous()

        calls["dense", length] = dense
        for name, linear_model in models.items():
            attention = layers_of(linear_model)[0].attention
            # Projected keys and values come in, so that the same work as in the dense core is timed.
            core = copy.copy(attention.attention_core)
            core.deferrable = None
            calls[name, length] = functools.partial(core, attention, *states, None, scaling, 0.0)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                if device != "cpu":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[key].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    longest = max(args.lengths)
    config = AutoConfig.for_model(
        "bert", hidden_size=args.hidden, num_attention_heads=args.heads, num_hidden_layers=args.layers,
        intermediate_size=4 * args.hidden, vocab_size=1000, max_position_embeddings=longest,
    )  # fmt: skip
    dense = AutoModel.from_config(config).to(args.device).eval()
    models = {
        f"k={slots}": hc.compress(copy.deepcopy(dense), hc.LinformerConfig(projected_length=slots))
        for slots in args.slots
    }
    rows = []
    for batch in args.batch_sizes:
        cores = core_seconds(models, args.heads, args.lengths, batch, 4 * args.repeats, args.device)
        for length in args.lengths:
            ids = torch.randint(5, 1000, (batch, length), device=args.device)
            timed = measure_latency({"dense": dense, **models}, [{"input_ids": ids}], args.repeats, warmup=1)
            ratios = speedups(timed, "dense")
            for entry in timed:
                name = entry.name
                slots = None if name == "dense" else int(name.partition("=")[2])
                model = dense if slots is None else models[name]
                mine = cores[name, length]
                # Against the same length of the dense core, and against half the length of its own.
                half = cores.get((name, length // 2))
                row = {
                    "model": name, "batch": batch, "length": length,
                    "core_ms": 1e3 * statistics.median(mine),
                    "core_speedup": median_ratio(cores["dense", length], mine),
                    "core_doubling": None if half is None else median_ratio(mine, half),
                    "core_arithmetic": 1.0 if slots is None else length / (2 * slots),
                    "model_ms": 1e3 * entry.p50, "model_speedup": ratios[name].median,
                    "model_arithmetic": hc.count_cost(dense, length).macs / hc.count_cost(model, length).macs,
                    "memory_mb": entry.peak_memory / 2**20,
                }  # fmt: skip
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    header = {
        "arguments": arguments_of(args), "commit": commit(), "environment": machine(),
        "memory": timed[0].memory_kind,
    }  # fmt: skip
    if args.out:
        write_json(args.out, {"header": header, "rows": rows})
    if args.plot:
        plot(rows, args.plot)


def median_ratio(first: list[float], second: list[float]) -> float:
    """Of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def plot(rows: list[dict], file: str) -> None:
    """Core time against length, one panel a batch size, and the slope of linear growth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows))
    colours = dict(zip(names, ("#000000", "#0072B2", "#D55E00", "#009E73"), strict=False))
    figure = Figure(figsize=(5 * len(batches), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for name, colour in colours.items():
            mine = [row for row in rows if row["model"] == name and row["batch"] == batch]
            lengths = [row["length"] for row in mine]
            axes.plot(lengths, [row["core_ms"] for row in mine], "o-", color=colour, label=f"{name}, attention core")
            axes.plot(lengths, [row["model_ms"] for row in mine], "s--", color=colour, label=f"{name}, whole encoder")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"batch {batch}")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    main()
