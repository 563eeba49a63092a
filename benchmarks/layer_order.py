"""Processor time and memory of the methods that treat layers in order: one method a process.

for what in one_shot sequential sparsegpt; do python benchmarks/layer_order.py --what $what; done
python benchmarks/layer_order.py --what sequential --model MODEL --examples 8 --tokens 512

Without a model on a random encoder. Inputs are random tokens. `passes` is the time without that of the second moments,
in forward passes of the intact model over the same inputs.
"""

import argparse
import json
import resource
import time

import torch
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.moments import SecondMoments


CONFIGS = {
    "one_shot": hc.StructuredPruningConfig(mac_ratio=0.5),
    "sequential": hc.StructuredPruningConfig(mac_ratio=0.5, order="sequential"),
    "sparsegpt": hc.WeightPruningConfig(criterion="sparsegpt", pattern="2:4", target_sparsity=0.5, scope="local"),
}


class TimedMoments:
    """Adds up the processor time of all second moments inside a block."""

    def __enter__(self) -> "TimedMoments":
        self.seconds, self._update = 0.0, SecondMoments.update

        def update(moments: SecondMoments, rows: torch.Tensor) -> None:
            start = time.process_time()
            self._update(moments, rows)
            self.seconds += time.process_time() - start

        SecondMoments.update = update
        return self

    def __exit__(self, *_: object) -> None:
        SecondMoments.update = self._update


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> float:
    """The faster of two passes over all inputs."""
    found = []
    for _ in range(2):
        start = time.process_time()
        for batch in data:
            model(**batch)
        found.append(time.process_time() - start)
    return min(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", choices=list(CONFIGS), required=True)
    parser.add_argument("--model", help="A folder; otherwise a random encoder.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model:
        model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    else:
        sizes = {"hidden_size": args.hidden, "num_attention_heads": args.heads, "intermediate_size": 4 * args.hidden}
        model = BertModel(BertConfig(**sizes, num_hidden_layers=args.layers, vocab_size=1000)).eval()
    at_once = max(2048 // args.tokens, 1)
    data = [{"input_ids": ids} for ids in torch.randint(1000, (args.examples, args.tokens)).split(at_once)]
    forward = forward_seconds(model, data)
    passes, calls = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    for layer in layers_of(model):
        layer.module.register_forward_pre_hook(lambda *_: calls.append(1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with TimedMoments() as moments:
        hc.compress(model, CONFIGS[args.what], data=data)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "what": args.what,
        "layers": len(layers_of(model)),
        "cpu_seconds": round(seconds, 1),
        "forward_seconds": round(forward, 2),
        "moments_seconds": round(moments.seconds, 1),
        "passes": round((seconds - moments.seconds) / forward, 2),
        "more_mb": round((peak - before) / 1024),
        "peak_mb": round(peak / 1024),
        "embeddings_run": len(passes),
        "layers_begun": len(calls),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
