"""Perplexity by the published protocol. The oracles are loops over single windows and results of the original code."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hf_compress.cli.main import main
from hf_compress.core.positions import most_tokens, usual_tokens
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.measured import measured
from hf_compress.tasks import perplexity as windows
from hf_compress.tasks.arguments import DataArguments, WindowArguments
from hf_compress.tasks.perplexity import WindowLosses, perplexity
from hf_compress.tasks.sources import load_task
from tests.labelled_models import write_rows
from tests.rounding import assert_equal_to_rounding


def by_hand(model, ids, context, stride=None):
    """The exponential of the mean loss of all predicted tokens, by the loss of transformers, window after window."""
    stride, total, count = stride or context, 0.0, 0
    for number, start in enumerate(range(0, len(ids) - context + 1, stride)):
        window = torch.tensor([ids[start : start + context]])
        labels = window.clone()
        if number:
            labels[:, : context - stride] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(input_ids=window, labels=labels).loss) * predicted, count + predicted
    return math.exp(total / count), count


@pytest.fixture
def ids():
    return torch.randint(3, 99, (151,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def place(tmp_path, monkeypatch, model, tokenizer):
    """A folder with a causal language model and an encoder, for texts beside them."""
    monkeypatch.chdir(tmp_path)
    for name, architecture, head in (("writer", "opt", "causal_lm"), ("encoder", "bert", "base")):
        model(architecture, head).save_pretrained(name)
        tokenizer.save_pretrained(name)
    return tmp_path


def told(capsys, command):
    assert main(command.split()) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_windows_are_measured_as_one_by_one(model, ids, architecture, stride):
    net = model(architecture, "causal_lm")
    found = perplexity(net, ids, context=16, stride=stride)
    expected, count = by_hand(net, ids, 16, stride)
    assert (found["perplexity"], found["predicted_tokens"]) == (pytest.approx(expected, rel=1e-5), count)
    assert found["windows"] == (151 - 16) // (stride or 16) + 1
    short = perplexity(net, ids, context=16, stride=stride, max_windows=3)
    end = 16 + 2 * (stride or 16)
    assert short["perplexity"] == pytest.approx(by_hand(net, ids[:end], 16, stride)[0], rel=1e-5)


def test_the_original_evaluation_of_opt(shared):
    """GPTQ's own `opt_eval` on a model of 32 positions and a text of 12 windows and a tail."""
    golden = shared / "specs" / "golden" / "gptq"
    net = AutoModelForCausalLM.from_pretrained(golden / "opt_tiny")
    tokens = np.load(golden / "opt_tokens.npz")["test"][0].tolist()
    found = perplexity(net, tokens, context=32)
    expected = json.loads((golden / "opt" / "results.json").read_text())["dense"]["ppl"]
    assert (found["windows"], found["perplexity"]) == (12, pytest.approx(expected, rel=1e-5))
    assert most_tokens(net) == usual_tokens(net) == 32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("opt-stories-1M", 4.776), ("stories260K", 3.031)])
def test_models_that_tell_stories(shared, name, expected):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    file = str(shared / "data" / "stories_synth" / "validation.parquet")
    texts = Dataset.from_parquet(file)["text"][:]
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in ids]
    found = perplexity(AutoModelForCausalLM.from_pretrained(shared / "models" / name), tokens, context=128)
    assert (found["windows"], found["perplexity"]) == (348, pytest.approx(expected, abs=1e-3))


# Memory


def test_scores_never_stand_in_memory_together(model, ids, monkeypatch):
    net = model("opt", "causal_lm")
    expected = perplexity(net, ids, context=50)
    monkeypatch.setattr(windows, "_SCORES", 7 * net.config.vocab_size)
    monkeypatch.setattr(windows, "_TOKENS", 100)
    read = []
    net.get_output_embeddings().register_forward_hook(lambda module, args, output: read.append(output.shape[:-1]))
    inputs = {"input_ids": torch.tensor([ids[:50], ids[50:100], ids[100:150]])}
    with torch.no_grad():
        found = WindowLosses(net)(inputs, inputs["input_ids"])
    assert max(math.prod(shape) for shape in read[2:]) == 7
    total, count = found.sum(0).tolist()
    assert math.exp(total / count) == pytest.approx(expected["perplexity"], rel=1e-5)


SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
    ids=["bounded", "scaled"],
)
def test_what_a_model_does_with_its_scores_counts(build, ids):
    torch.manual_seed(0)
    net = build().eval()
    inputs = {"input_ids": torch.tensor([ids[:50], ids[50:100]])}
    losses = WindowLosses(net)
    with torch.no_grad():
        found = losses(inputs, inputs["input_ids"])
        logits = net(**inputs).logits[:, :-1]
        one = torch.nn.functional.cross_entropy(logits.mT, inputs["input_ids"][:, 1:], reduction="none").sum(1)
        body = net.get_output_embeddings()(net.base_model(**inputs)[0])[:, :-1]
        wrong = torch.nn.functional.cross_entropy(body.mT, inputs["input_ids"][:, 1:], reduction="none").sum(1)
    assert_equal_to_rounding(found[:, 0].float(), one)
    assert float((wrong - one).abs().min()) > 1


# Texts


def streams(place, args, split=None, **cut):
    """The text of the measured split, as the tokens of its windows tell it."""
    task = load_task(args, AutoConfig.from_pretrained("writer")).windowed(WindowArguments(**cut))
    return measured("writer", task, task.measured_split(split), args.max_length)


def joined(each):
    return [token for row in each.rows["input_ids"] for token in row]


def test_rows_are_joined_as_published(place, tokenizer):
    rows = [{"text": text} for text in ("", " = good = ", "", " bad film . ")]
    for name in ("wikitext2", "ptb"):
        write_rows(place / name / "test.jsonl", rows)
        write_rows(place / name / "validation.jsonl", [{"text": "plot"}])
    for name, between in (("wikitext2", "\n\n"), ("ptb", " ")):
        task = load_task(DataArguments(data_dir=name))
        # Published figures are of the test split.
        assert task.measured_split() == "test"
        assert task._texts("test") == [between.join(row["text"] for row in rows)]
        assert task.measured_split("validation") == "validation"


def test_published_files_on_the_hub(place, tokenizer, monkeypatch):
    """`c4` has one file for each split; the first 1,100 documents are measured, in 256 windows at most."""
    asked = []

    def load(path, configuration, data_files=None):
        asked.append((path, configuration, data_files))
        docs = Dataset.from_dict({"text": [f"good {number}" for number in range(1200)], "url": [""] * 1200})
        return {"train": docs, "validation": docs, "test": docs}

    monkeypatch.setattr("datasets.load_dataset", load)
    task = load_task(DataArguments(task_name="c4"))
    assert (task.measured_split(), task.windowed(WindowArguments()).windows.max_windows) == ("validation", 256)
    assert task._texts("validation") == [" ".join(f"good {number}" for number in range(1100))]
    assert len(task._texts("train")[0].split(" ")) == 2400
    rows = task.windowed(WindowArguments()).encode("validation", tokenizer, 4)
    assert (len(rows), task.windowed(WindowArguments(max_windows=3)).encode("validation", tokenizer, 4).num_rows) == (
        256, 3,
    )  # fmt: skip
    for name in ("wikitext2", "ptb"):
        assert load_task(DataArguments(task_name=name)).measured_split() == "test"
    files = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked == [
        ("allenai/c4", None, files),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
        ("ptb-text-only/ptb_text_only", None, None),
    ]


def test_a_plain_text_is_one_text(place, tokenizer):
    text = "good film\n\n  bad plot . \n" * 20
    (place / "story.txt").write_text(text)
    each = streams(place, DataArguments(task_name="story.txt", max_length=8))
    ids = tokenizer(text)["input_ids"]
    # Each window is whole; the rest is left out, and nothing is added to a window.
    assert joined(each) == ids[: len(ids) // 8 * 8]
    assert each.task.protocol(each.rows) == {
        "windows": len(ids) // 8, "context": 8, "stride": 8, "tokens_added_per_window": 0,
        "predicted_tokens": len(ids) // 8 * 7,
    }  # fmt: skip
    args = DataArguments(validation_file="story.txt", separate_rows=True, task_kind="language-modeling")
    lines = load_task(args).split("validation")["text"]
    assert lines[:2] == ["good film", "  bad plot . "]


def test_the_command(place, tokenizer, capsys):
    text = "good film bad plot . " * 60
    (place / "story.txt").write_text(text)
    options = "--device cpu --output_file out.json"
    net, ids = AutoModelForCausalLM.from_pretrained("writer"), tokenizer(text)["input_ids"]
    for flags, context, stride in (("", 64, None), ("--max_length 32 --stride 8", 32, 8)):
        assert main(f"evaluate --models writer --task_name story.txt {options} {flags}".split()) == 0
        found = json.loads((place / "out.json").read_text())["writer"]
        expected, count = by_hand(net, ids, context, stride)
        assert (found["perplexity"], found["predicted_tokens"]) == (pytest.approx(expected, rel=1e-5), count)
        assert (found["context"], found["stride"], found["windows"]) == (
            context, stride or context, (len(ids) - context) // (stride or context) + 1,
        )  # fmt: skip
        printed = capsys.readouterr().out
        assert "tokens_added_per_window          0" in printed
        shown = re.search(r"^perplexity +([\d.]+)$", printed, re.MULTILINE)
        assert float(shown[1]) == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_measured_as_its_windows(place, tokenizer):
    (place / "story.txt").write_text("good film bad plot . " * 40)
    each = streams(place, DataArguments(task_name="story.txt", max_length=16), stride=4)
    assert isinstance(each, Measured)
    alone, together = (evaluated(each, size).metrics()["perplexity"] for size in (1, 7))
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(
        by_hand(each.model, tokenizer("good film bad plot . " * 40)["input_ids"], 16, 4)[0], rel=1e-5
    )


# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task_name story.txt --stride 0", "stride must be at least 1, got 0"),
        (
            "--task_name story.txt --stride 17 --max_length 16",
            "stride must be in 1..16, the tokens of a window",
        ),
        ("--task_name story.txt --max_windows 0", "max_windows must be at least 1, got 0"),
        ("--task_name story.txt --max_length 67", "max_length must be at most 64, the positions of the model"),
        (
            "--task_name short.txt",
            "the text has 4 tokens, fewer than one window of 64: give more text",
        ),
        ("--task_name empty.txt", "task_name 'empty.txt' must not be empty"),
        ("--task_name blank.txt", "text must hold at least one text, got none"),
        ("--task_name absent.txt", "task_name 'absent.txt' must exist and be a file"),
        ("--task story.txt", "'task' is not an option. Did you mean 'task_name'?"),
        ("--task_name wikitext", "task_name must be one of .*wikitext2, or a file"),
    ],
)
def test_what_cannot_be_measured(place, capsys, flags, message):
    (place / "story.txt").write_text("good film bad plot . " * 60)
    (place / "short.txt").write_text("good film")
    (place / "empty.txt").write_text("")
    (place / "blank.txt").write_text(" \n\n")
    assert re.search(message, told(capsys, f"evaluate --models writer --device cpu {flags}"))


def test_models_that_cannot_be_measured(place, model, tokenizer, capsys):
    (place / "story.txt").write_text("good film bad plot . " * 60)
    command = "evaluate --device cpu --task_name story.txt --task_kind language-modeling --models"
    assert (
        "it is a BertModel, and language-modeling needs an architecture that predicts each token from those before"
        in (told(capsys, f"{command} encoder"))
    )
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"word{number}" for number in range(200)])
    larger.save_pretrained("writer")
    assert "The tokenizer must have at most the model's 99 tokens" in told(capsys, f"{command} writer")


def test_only_running_texts_have_windows(place, capsys):
    rows = [{"text": "good", "label": "x"}, {"text": "bad", "label": "y"}]
    write_rows(place / "data" / "validation.jsonl", rows)
    message = told(capsys, "evaluate --device cpu --models encoder --data_dir data --stride 4")
    assert "stride must be left out for sequence-classification, got 4" in message
