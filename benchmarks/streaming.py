"""Prune and quantise a model layer by layer from its files: time, peak memory, and what is left of killed runs.

    python -m benchmarks.streaming --work_dir build/streaming --out streaming.json

Writes a Llama of random weights in shards, one layer after the other, and compresses it in processes of their own:
once undisturbed, and once killed at random moments and started again until it ends. Both must end in the same files.
Memory is the largest resident set of the process less what it has after the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hc
from benchmarks.header import arguments_of, commit, machine


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A Llama of random weights in bfloat16; one layer is in memory at a time."""
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(args.seed)
    places: dict[str, str] = {}
    for part in [None, *range(args.layers)]:
        # The head is tied to the embeddings.
        outside = [name for name in shapes if ".layers." not in name and not name.startswith("lm_head.")]
        names = outside if part is None else [name for name in shapes if name.startswith(f"model.layers.{part}.")]
        file = f"model-{len(set(places.values())) + 1:05d}-of-{args.layers + 1:05d}.safetensors"
        tensors = {}
        for name in names:
            norm = name.endswith("norm.weight")
            drawn = (
                torch.ones(shapes[name].shape) if norm else torch.randn(shapes[name].shape, generator=generator) / 50
            )
            tensors[name] = drawn.bfloat16()
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def resident() -> tuple[int, int]:
    """Bytes resident now, and at most so far."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def step_of(args: argparse.Namespace, step: str) -> Any:
    if step == "prune":
        return hc.StructuredPruningConfig(mac_ratio=args.mac_ratio, order="sequential", ridge=1e-3)
    return hc.WeightQuantizationConfig(bits=args.bits, group_size=128)


def work(args: argparse.Namespace, step: str, source: str, target: str, told: str) -> None:
    """Compress in this process, and tell the time and the memory."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    data = [
        {"input_ids": torch.randint(args.vocab, (1, args.length), generator=generator)} for _ in range(args.samples)
    ]
    config = step_of(args, step)
    torch.ones(256, 256) @ torch.ones(256, 256)
    before, start = resident()[0], time.perf_counter()
    hc.compress_folder(source, target, config, data=data)
    found = {"seconds": time.perf_counter() - start, "peak_bytes": resident()[1] - before, "before_bytes": before}
    Path(told).write_text(json.dumps(found))


def begin(args: argparse.Namespace, step: str, source: Path, target: Path, told: Path) -> Any:
    process = multiprocessing.get_context("spawn").Process(
        target=work, args=(args, step, str(source), str(target), str(told))
    )
    process.start()
    return process


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def compare(args: argparse.Namespace, step: str, source: Path) -> dict[str, Any]:
    """One undisturbed and one much disturbed run of a step."""
    place = Path(args.work_dir)
    whole, broken, told = place / f"{step}-whole", place / f"{step}-killed", place / f"{step}.json"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    begin(args, step, source, whole, told).join()
    found = json.loads(told.read_text())
    draw, killed, start = random.Random(args.seed), [], time.perf_counter()
    while len(killed) < args.kills:
        process = begin(args, step, source, broken, told)
        process.join(draw.uniform(0.05, 1.5) * found["seconds"] / args.kills + 5)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        files = sorted((broken / ".unfinished-layers" / "layers-0").glob("layer-*"))
        killed.append({"after_seconds": round(time.perf_counter() - start, 1), "layers_done": len(files)})
        assert not (broken / "config.json").exists()
    begin(args, step, source, broken, told).join()
    layer = sum(p.numel() for p in layer_shapes(source))
    activations = args.samples * args.length * args.hidden * 2
    return {
        **found,
        "layer_bytes": 2 * layer,
        "activation_bytes": activations,
        "moments_bytes": 8 * args.ffn**2,
        "peak_in_layers": round(found["peak_bytes"] / (2 * layer), 2),
        "kills": killed,
        "seconds_with_kills": round(time.perf_counter() - start, 1),
        "same_bytes": digests(whole) == digests(broken),
        "digest": hashlib.sha256(json.dumps(digests(whole)).encode()).hexdigest()[:16],
    }


def layer_shapes(folder: Path) -> list[torch.Tensor]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    return list(model.model.layers[0].parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", default="build/streaming")
    parser.add_argument("--out", default=None)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--mac_ratio", type=float, default=0.7)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="+", default=["prune", "quantise"], choices=["prune", "quantise"])
    args = parser.parse_args()
    source, load = Path(args.work_dir) / "source", os.getloadavg()[0]
    if not (source / "model.safetensors.index.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        write_model(source, args)
    results: dict[str, Any] = {"arguments": arguments_of(args), "commit": commit()}
    start = source
    for step in args.steps:
        results[step] = compare(args, step, start)
        print(json.dumps(results[step], indent=2), flush=True)
        start = Path(args.work_dir) / f"{step}-whole"
    results["machine"] = machine(load)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
