"""Remove attention heads and neurons of an OPT or Llama model without training, and measure what that costs.

    python examples/prune_opt.py --model facebook/opt-125m --task wikitext2 --mu 0.7 --out opt-125m-0.7

`--mu` is the fraction of the arithmetic that is kept. The model is calibrated on `--nsamples` windows from random
places of the training text of `--task`, or of another text: `--calibration_dir DIR` reads `DIR/train.parquet` or txt.
Saves the pruned model, which plain `from_pretrained` opens again, and its figures as `perplexity.json` beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--mu", type=float, default=0.7)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir")
    parser.add_argument("--calibration_dir")
    parser.add_argument("--context", type=int)
    parser.add_argument("--max_windows", type=int)
    parser.add_argument("--out", default="output/opt/pruned")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kind = "language-modeling"
    task = hc.load_task(hc.DataArguments(task_name=args.task, data_dir=args.data_dir, task_kind=kind))
    text = task
    if args.calibration_dir:
        text = hc.load_task(hc.DataArguments(data_dir=args.calibration_dir, task_kind=kind))
    context = task.longest(model, tokenizer, args.context)
    windows = args.max_windows or (256 if args.task == "c4" else None)
    [ids] = task.tokens(task.measured_split(), tokenizer)
    dense, before = hc.perplexity(model, ids, context, max_windows=windows), hc.count_cost(model, context)
    print(f"dense  perplexity {dense['perplexity']:.4f}  {before.macs:.4g} multiply-accumulates")

    rows = text.random_windows(tokenizer, context, args.nsamples, args.seed)
    batches = hc.calibration_batches(rows, tokenizer, len(rows), args.seed, batch_size=1)
    hc.compress(model, hc.StructuredPruningConfig(mac_ratio=args.mu), data=batches)
    pruned, after = hc.perplexity(model, ids, context, max_windows=windows), hc.count_cost(model, context)
    print(f"pruned perplexity {pruned['perplexity']:.4f}  {after.macs:.4g} multiply-accumulates")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {"task": args.task, "context": context, "mu": args.mu, "dense": dense, "pruned": pruned}
    Path(args.out, "perplexity.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
