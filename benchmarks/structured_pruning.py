"""Accuracy of structured pruning: dense, without retraining, recovered; four selections, correction on and off.

Also of weights of few bits: `--quantize '{"bits": 4, "group_size": 64}'`.

    python benchmarks/structured_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json \
        --seeds 0 1 2 --selections interpolative fisher magnitude random

Every finished cell is written to the result file at once and skipped when the command is given again;
dense models that lie in the working folder already are used.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from accuracy import Results as Results
from accuracy import argument_parser, label_of, open_results, open_task, scores, stem, training
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.stages.arguments import TeacherArguments
from hf_compress.stages.distill import Distill, distill
from hf_compress.stages.finetune import Finetune, finetune
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.tasks.inputs import calibration_batches


# The recorded runs warmed up for longer than those of the other benchmarks.
WARMUP = {"warmup_steps": 0.1}


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.7])
    parser.add_argument("--selections", nargs="+", default=["interpolative"])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--recovery_epochs", type=float, default=2)
    parser.add_argument("--recovery_learning_rate", type=float, default=2e-4)
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--uncorrected", action="store_true", help="Also without correction, for every selection.")
    parser.add_argument(
        "--also", nargs="*", default=[], type=json.loads, metavar="JSON",
        help="Also interpolative with these fields of the config, e.g. '{\"center\": true}'.",
    )  # fmt: skip
    parser.add_argument("--quantize", nargs="*", default=[], type=json.loads, metavar="JSON")
    parser.add_argument("--no_recovery", action="store_true")
    return parser.parse_args()


def variants(selection: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """Names and options of what is tried with one selection; the first is the plain one."""
    found = [(selection, {})]
    if args.uncorrected:
        found.append((f"{selection}-uncorrected", {"correction": False}))
    if selection == "interpolative":
        for fields in args.also:
            found.append((f"{selection}-{'-'.join(f'{name}={value}' for name, value in fields.items())}", fields))
    return found


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data, task, tokenizer, rows = open_task(args)
    results = open_results(args, rows)

    for seed in args.seeds:
        place = stem(args, seed)
        dense = f"{place}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            if not Path(dense, "config.json").is_file():
                finetune(Finetune(
                    model=ModelArguments(args.model, freeze_embeddings=True), data=data,
                    training=TrainingArguments(**training(args, dense, seed, **WARMUP)),
                ))  # fmt: skip
            return scores(open_model(dense, task), rows, tokenizer)

        results.cell(f"seed{seed}/dense", train_dense)
        batches = calibration_batches(rows["train"], tokenizer, args.samples, seed)
        for fields in args.quantize:

            def quantize(fields=fields, dense=dense, batches=batches) -> dict:
                model = open_model(dense, task)
                before = hc.count_cost(model, 32).bytes
                hc.compress(model, hc.WeightQuantizationConfig(**fields), data=batches)
                return {
                    **scores(model, rows, tokenizer), "bytes_before": before, "bytes": hc.count_cost(model, 32).bytes,
                }  # fmt: skip

            results.cell(f"seed{seed}/quantize/{label_of(fields)}", quantize)
        for ratio in args.ratios:
            for selection in args.selections:
                for label, options in variants(selection, args):

                    def prune(ratio=ratio, selection=selection, options=options, place=place, dense=dense, seed=seed):
                        model = open_model(dense, task)
                        before = hc.count_cost(model, 32).params
                        config = hc.StructuredPruningConfig(mac_ratio=ratio, selection=selection, seed=seed, **options)
                        start = time.perf_counter()
                        hc.compress(model, config, data=batches)  # noqa: B023  (called before the next seed)
                        seconds = time.perf_counter() - start
                        if selection == "interpolative" and not options:
                            model.save_pretrained(f"{place}-{ratio}")
                            tokenizer.save_pretrained(f"{place}-{ratio}")
                        step = hc.steps_of(model)[-1]
                        return {
                            **scores(model, rows, tokenizer), "params": hc.count_cost(model, 32).params / before,
                            "heads": step["heads_per_layer"], "neurons": step["neurons_per_layer"],
                            "prune_seconds": round(seconds, 2),
                        }  # fmt: skip

                    results.cell(f"seed{seed}/{ratio}/{label}", prune)

            def recover(ratio=ratio, place=place, dense=dense, seed=seed) -> dict:
                out = f"{place}-{ratio}-recovered"
                distill(Distill(
                    model=ModelArguments(f"{place}-{ratio}", freeze_embeddings=True), teacher=TeacherArguments(dense),
                    data=data, distillation=hc.DistillationArguments(
                        **training(args, out, seed, **WARMUP, num_train_epochs=args.recovery_epochs,
                                   learning_rate=args.recovery_learning_rate),
                        alpha_task=1.0, alpha_output=1.0, alpha_layer=args.alpha_layer, temperature=2.0,
                        teacher_cache_dir=f"{place}-teacher",
                    ),
                ))  # fmt: skip
                return scores(open_model(out, task), rows, tokenizer)

            if not args.no_recovery:
                results.cell(f"seed{seed}/{ratio}/recovered", recover)


if __name__ == "__main__":
    main()
