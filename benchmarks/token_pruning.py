"""Accuracy against real arithmetic of token pruning: learned thresholds, thresholds set by hand, top-k.

    python benchmarks/token_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

Every variant starts from the same fine-tuned model and trains for the same number of epochs; `learned` spends half of
them on its soft stage. Latency of one model a variant is measured against the dense one, interleaved, on length-sorted
unpadded batches. Every finished cell is written to the result file at once and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict

from accuracy import argument_parser, mean_tokens, open_results, open_task, scores, stem, training
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.stages.arguments import OptionalTeacherArguments
from hf_compress.stages.finetune import Finetune, finetune
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.prune_tokens import PruneTokens, TokenPruningArguments, prune_tokens
from hf_compress.tasks.inputs import length_sorted


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.6, 0.4], help="Relative MACs, for learned.")
    parser.add_argument("--keep_rates", type=float, nargs="*", default=[0.3, -0.2])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.008, 0.012])
    parser.add_argument("--ramps", type=float, nargs="*", default=[], help="Relative MACs, for the initial ramp.")
    parser.add_argument("--reference_length", type=int, default=128)
    parser.add_argument("--threshold_learning_rate", type=float, default=2e-4)
    parser.add_argument("--no_teacher", action="store_true")
    parser.add_argument("--latency", action="store_true", help="Of the first seed's models.")
    parser.add_argument("--plot", help="PNG file: accuracy against relative MACs, of whatever the result file holds.")
    return parser.parse_args()


def plot(cells: dict[str, dict], file: str) -> None:
    """Means and standard deviations over seeds; a line joins the settings of one kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = {}
    for name, cell in cells.items():
        if name.startswith("seed"):
            point = (cell["relative_macs"], 100 * cell["test"]["accuracy"])
            points.setdefault(name.split("/", 1)[1], []).append(point)
    kinds: dict[str, list[list[float]]] = {}
    for name, found in points.items():
        macs, accuracy = zip(*found, strict=True)
        spread = statistics.stdev(accuracy) if len(found) > 1 else 0.0
        kinds.setdefault(name.split("/")[0], []).append([statistics.mean(macs), statistics.mean(accuracy), spread])
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {"dense": "#000000", "learned": "#0072B2", "manual": "#D55E00", "topk": "#009E73", "ramp": "#CC79A7"}
    for kind, rows in kinds.items():
        macs, accuracy, spread = zip(*sorted(rows), strict=True)
        axes.errorbar(macs, accuracy, spread, color=colours[kind], marker="o", capsize=3, label=kind)
    axes.axhline(kinds["dense"][0][1] - 1, color="#999999", linestyle=":", label="dense - 1 point")
    axes.set(xlabel="multiply-accumulates, relative to dense", ylabel="test accuracy x 100")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8)
    figure.savefig(file)


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data, task, tokenizer, rows = open_task(args)
    measured_on = rows["validation" if "validation" in rows else "test"]
    results = open_results(args, rows, mean_tokens=mean_tokens(measured_on))
    texts = {name: list(length_sorted(split, 64, tokenizer)) for name, split in rows.items() if name != "train"}

    def measured(folder: str, dense: str) -> dict:
        model, teacher = open_model(folder, task), open_model(dense, task)
        found = scores(model, rows, tokenizer)
        for name, batches in texts.items():
            macs = (hc.count_cost(x, data=batches).macs for x in (model, teacher))
            found[name]["relative_macs"] = next(macs) / next(macs)
        return {**found, "relative_macs": next(iter(found.values()))["relative_macs"]}

    rate = {"threshold_learning_rate": args.threshold_learning_rate}
    variants = {
        **{f"learned/{x}": {"target_relative_macs": x, **rate} for x in args.targets},
        **{f"ramp/{x}": {"target_relative_macs": x, "soft_fraction": 0.0} for x in args.ramps},
        **{f"topk/{x}": {"prune_mode": "topk", "token_keep_rate": x} for x in args.keep_rates},
        **{f"manual/{x}": {"final_token_threshold": x, "soft_fraction": 0.0} for x in args.thresholds},
    }
    folders = {}
    for seed in args.seeds:
        place = stem(args, seed, "tokens-")
        dense = f"{place}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            steps = TrainingArguments(**training(args, dense, seed))
            start = ModelArguments(args.model, freeze_embeddings=True)
            finetune(Finetune(model=start, data=data, training=steps))
            return measured(dense, dense)

        results.cell(f"seed{seed}/dense", train_dense)
        folders.setdefault("dense", dense)
        for name, options in variants.items():
            out = f"{place}-{name.replace('/', '-')}"

            def train_pruned(seed=seed, dense=dense, out=out, options=options) -> dict:
                prune_tokens(PruneTokens(
                    model=ModelArguments(dense, freeze_embeddings=True),
                    pruning=TokenPruningArguments(**options, score_reference_length=args.reference_length),
                    teacher=OptionalTeacherArguments(None if args.no_teacher else dense), data=data,
                    training=TrainingArguments(**training(args, out, seed)),
                ))  # fmt: skip
                return measured(out, dense)

            results.cell(f"seed{seed}/{name}", train_pruned)
            folders.setdefault(name, out)

    def time_models(size: int) -> dict:
        models = {name: open_model(folder, task) for name, folder in folders.items()}
        models["keep-all"] = hc.compress(
            open_model(folders["dense"], task), hc.TokenPruningConfig(final_token_threshold=0.0)
        )
        timed = measure_latency(models, unpadded_batches(measured_on, tokenizer, size, 256), 10, 1)
        ratios = speedups(timed, "dense")
        return {x.name: {"p50_ms": 1e3 * x.p50, "speedup": asdict(ratios[x.name])} for x in timed}

    if args.latency:
        for size in (1, 8, 32):
            results.cell(f"latency/batch{size}", lambda size=size: time_models(size))
    if args.plot:
        plot(results.content["cells"], args.plot)


if __name__ == "__main__":
    main()
