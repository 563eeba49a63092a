"""Processor time and memory of the methods that treat layers in order, on a random encoder: one method a process.

for what in one_shot sequential sparsegpt; do python benchmarks/layer_order.py --what $what; done
"""

import argparse
import json
import resource
import time

import torch
from transformers import BertConfig, BertModel

import hf_compress as hc


CONFIGS = {
    "one_shot": hc.StructuredPruningConfig(mac_ratio=0.5),
    "sequential": hc.StructuredPruningConfig(mac_ratio=0.5, order="sequential"),
    "sparsegpt": hc.WeightPruningConfig(criterion="sparsegpt", pattern="2:4", target_sparsity=0.5, scope="local"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", choices=list(CONFIGS), required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "num_attention_heads": args.heads, "intermediate_size": 4 * args.hidden}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=args.layers, vocab_size=1000)).eval()
    data = [{"input_ids": ids} for ids in torch.randint(1000, (args.examples, args.tokens)).split(32)]
    passes, calls = [], []
    model.embeddings.register_forward_hook(lambda *_: passes.append(1))
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    hc.compress(model, CONFIGS[args.what], data=data)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "what": args.what,
        "layers": args.layers,
        "cpu_seconds": round(seconds, 1),
        "more_mb": round((peak - before) / 1024),
        "peak_mb": round(peak / 1024),
        "embeddings_run": len(passes),
        "layers_begun": len(calls),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
