"""The first program of the README runs as it stands; only the Hub is replaced by local files."""

import re
from pathlib import Path

import datasets
import torch
import transformers

import hf_compress


README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_first_program_runs(tmp_path, monkeypatch, model, tokenizer, sentences):
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    name = re.search(r'name = "(.*?)"', program)[1]
    monkeypatch.chdir(tmp_path)
    # On a machine without the Hub, its names are folders.
    model("distilbert", "sequence_classification").save_pretrained(name)
    tokenizer.save_pretrained(name)
    rows = datasets.Dataset.from_dict({
        "sentence": [text for text, _ in sentences] * 8,
        "label": [label for _, label in sentences] * 8,
        "idx": list(range(8 * len(sentences))),
    })  # fmt: skip
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows)
    names: dict = {}
    exec(compile(program.replace("max_steps=500", "max_steps=4"), "README.md", "exec"), names)
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "train"})]
    trained = names["trainer"].model
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(name)
    length = hf_compress.steps_of(trained)[0]["seq_len"]
    assert hf_compress.count_cost(trained, length).macs <= 0.5 * hf_compress.count_cost(dense, length).macs
    reloaded = names["model"]
    assert reloaded is not trained
    assert hf_compress.steps_of(reloaded) == hf_compress.steps_of(trained)
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[key].cpu()) for key, tensor in reloaded.state_dict().items())
