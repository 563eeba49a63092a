"""Measure the perplexity of an OPT or Llama model as the papers on compression do.

    python examples/opt_eval.py --model facebook/opt-125m --task wikitext2

Any causal language model, compressed or not, and any text work: `--task wikitext2`, `ptb` and `c4` are read from the
hub, `--data_dir DIR` reads `DIR/{validation,test}.parquet` (or txt) instead. Windows of `--context` tokens do not
overlap unless `--stride` is smaller; the tail is dropped, and no token is added to a window. What is measured is
appended to `--output` as a line of JSON.
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
    parser.add_argument("--data_dir")
    parser.add_argument("--context", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--max_windows", type=int)
    parser.add_argument("--output", default="output/opt/perplexity.jsonl")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # The published figures are in half precision on accelerators; processors need single.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = hc.DataArguments(task_name=args.task, data_dir=args.data_dir, task_kind="language-modeling")
    task = hc.load_task(data)
    split = task.measured_split()
    [ids] = task.tokens(split, tokenizer)

    context = task.longest(model, tokenizer, args.context)
    # Of c4, 256 windows at most, as published.
    windows = args.max_windows or (256 if args.task == "c4" else None)
    found = hc.perplexity(model.to(device), ids, context, args.stride, windows)
    line = {"model": args.model, "task": args.task, "split": split, "context": context, **found}
    print(
        f"{args.task} {split}: perplexity {found['perplexity']:.4f} in {found['windows']} windows of {context} tokens"
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with Path(args.output).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
