"""Round the weights of an OPT or Llama model, pruned or not, to a few bits, and measure what that costs.

    python examples/quantize_opt.py --model opt-125m-0.7 --task wikitext2 --bits 4 --out opt-125m-0.7-4bit

GPTQ reads `--nsamples` windows from random places of the training text of `--task`, or of another text:
`--calibration_dir DIR` reads `DIR/train.parquet` (or txt). `--nearest` rounds to nearest and reads nothing. Llama and
its relatives round the weights of large inputs first; `--act_order` does so for OPT, too. Saves packed integers,
which plain `from_pretrained` opens again, and the figures as `perplexity.json` beside them.
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
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groupsize", type=int, default=-1)
    parser.add_argument("--act_order", action="store_true")
    parser.add_argument("--nearest", action="store_true")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir")
    parser.add_argument("--calibration_dir")
    parser.add_argument("--context", type=int)
    parser.add_argument("--max_windows", type=int)
    parser.add_argument("--out", default="output/opt/quantized")
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
    before = hc.perplexity(model, ids, context, max_windows=windows)
    print(f"before    perplexity {before['perplexity']:.4f}")

    batches = None
    if not args.nearest:
        rows = text.random_windows(tokenizer, context, args.nsamples, args.seed)
        batches = hc.calibration_batches(rows, tokenizer, len(rows), args.seed, batch_size=1)
    config = hc.WeightQuantizationConfig(
        bits=args.bits,
        group_size=args.groupsize,
        act_order=args.act_order or None,
        algorithm="rtn" if args.nearest else "gptq",
    )
    hc.compress(model, config, data=batches)
    after = hc.perplexity(model, ids, context, max_windows=windows)
    print(f"quantized perplexity {after['perplexity']:.4f}")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in Path(args.out).glob("*.safetensors"))
    print(f"{size / 1e6:.2f} MB on disk")
    facts = {"task": args.task, "context": context, "bits": args.bits, "before": before, "quantized": after}
    Path(args.out, "perplexity.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
