"""Which method works on which architecture: `python -m tests.contract.support` tries all, writes docs/support.md."""

import copy
import logging
import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

import hf_compress as hc
from hf_compress.core.architectures import ARCHITECTURES, layers_of
from tests.conftest import ARCHITECTURES as TINY
from tests.conftest import _batches
from tests.contract.conftest import METHOD_CONFIGS
from tests.rounding import assert_equal_to_rounding


PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
BEGIN = "<!-- printed by `python -m tests.contract.support` -->"
END = "<!-- end of what was printed -->"
TITLES = {"linformer": "linear attention"}
# What a refusal says -> how the table puts it.
REFUSALS = {
    "bidirectional encoder": "no: causal",
    "attention code of its own": "no: attention code of its own",
    "must be an encoder of type": "no",
    "max_tokens must be given": "needs `max_tokens`",
    "model_type must be one of": "no",
    "must have word embeddings": "no: no words",
}


def tiny_config(kind):
    """A small config of a supported type; types without one of their own take that of a type with the same row."""
    if kind in TINY:
        return TINY[kind]()
    like = next(name for name in TINY if ARCHITECTURES.get(name) is ARCHITECTURES[kind])
    values = TINY[like]().to_dict()
    return AutoConfig.for_model(kind, **{name: value for name, value in values.items() if name != "model_type"})


def verdict(method, dense):
    """A few words on a method and a model: what it changes, after a skeleton took the weights; or why it refuses."""
    config, model = METHOD_CONFIGS.get(method, hc.METHODS[method].config_class)(), copy.deepcopy(dense)
    try:
        hc.compress(model, config, data=_batches(model.config))
    except ValueError as error:
        return next(words for part, words in REFUSALS.items() if part in str(error))
    skeleton = hc.rebuild(AutoModel.from_config(copy.deepcopy(model.config))).eval()
    skeleton.load_state_dict(model.state_dict(), strict=True)
    seen = _batches(model.config, count=1)[0]
    with torch.no_grad():
        assert_equal_to_rounding(skeleton(**seen)[0], model(**seen)[0])
    if dense.config.model_type not in ARCHITECTURES:
        return "yes"
    layers = layers_of(model, packed=True)
    if method == "structured_pruning":
        return "key-value groups and neurons" if layers[0].queries_per_unit > 1 else "heads and neurons"
    if method == "linformer" and any(layer.window is not None for layer in layers):
        return "layers without a window"
    if method == "weight_pruning" and any(projection.transposed for projection in layers[0].projections.values()):
        return "with `Conv1D` in `pruning_op_types`"
    return "yes"


def architecture_rows():
    """Display name of each supported type, and of one unsupported one -> its cells."""
    rows = {}
    for kind in ARCHITECTURES:
        config = tiny_config(kind)
        rows[type(config).__name__.removesuffix("Config")] = cells_of(config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 99, "pad_token_id": 0}
    rows["any other model"] = cells_of(AutoConfig.for_model("fnet", **sizes))
    return rows


def cells_of(config):
    torch.manual_seed(0)
    dense = AutoModel.from_config(config).eval()
    return tuple(verdict(method, dense) for method in hc.METHODS)


def table():
    """The table as Markdown; architectures with equal cells share a row."""
    grouped = {}
    for name, cells in architecture_rows().items():
        grouped.setdefault(cells, []).append(name)
    titles = [TITLES.get(method, method.replace("_", " ")) for method in hc.METHODS]
    lines = [f"| architecture | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in grouped.items()]
    return "\n".join(lines)


def every_type_is_known():
    """Older releases of transformers lack some of the types."""
    return set(ARCHITECTURES) <= set(CONFIG_MAPPING.keys())


def printed(text):
    """What stands between the marks in a text."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main():
    logging.disable(logging.WARNING)
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    sys.stdout.write(printed(PAGE.read_text()) + "\n")


if __name__ == "__main__":
    main()
