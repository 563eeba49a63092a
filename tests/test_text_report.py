"""Reports on language models: how the text was cut, and what each model writes. The oracle writes token by token."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compress.cli.main import main
from tests.labelled_models import write_rows


REPORT = "report --device cpu --output_dir report --latency_repeats 1 --latency_batch_sizes 1 --latency_examples 2"
TEXT = "good film bad plot . the cast was good , a bad film . "


@pytest.fixture
def place(tmp_path, monkeypatch, model, tokenizer):
    """A folder with two causal language models, a classifier, and a text."""
    monkeypatch.chdir(tmp_path)
    for name, architecture, head in (
        ("writer", "opt", "causal_lm"), ("other", "llama", "causal_lm"), ("judge", "bert", "sequence_classification"),
    ):  # fmt: skip
        model(architecture, head).save_pretrained(name)
        tokenizer.save_pretrained(name)
    (tmp_path / "story.txt").write_text(TEXT * 40)
    # Drawn from other entries of the report.
    monkeypatch.setattr("hf_compress.report.comparison._plot", lambda report, folder: None)
    return tmp_path


def written(name, prompt, tokenizer, tokens):
    """The likeliest token, again and again; a model ends its text with the token that ends texts."""
    model = AutoModelForCausalLM.from_pretrained(name)
    ids = tokenizer(prompt)["input_ids"]
    length = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


def test_models_write_on_from_the_same_beginnings(place, tokenizer, capsys):
    command = f"{REPORT} --models writer other --task_name story.txt --max_length 32 --stride 16 --max_windows 6"
    assert main([*command.split(), "--sample_prompts", "good film", "a bad plot", "--sample_tokens", "6"]) == 0
    report = json.loads((place / "report" / "report.json").read_text())
    assert report["protocol"] == {
        "windows": 6, "context": 32, "stride": 16, "tokens_added_per_window": 0, "predicted_tokens": 31 + 5 * 16,
    }  # fmt: skip
    assert report["num_examples"] == 6
    texts = (place / "report" / "report.md").read_text(), (place / "report" / "report.html").read_text()
    for entry in report["models"]:
        assert entry["samples"] == [
            {"prompt": prompt, "continuation": written(entry["name"], prompt, tokenizer, 6)}
            for prompt in ("good film", "a bad plot")
        ]
        for sample in entry["samples"]:
            assert sample["continuation"] in texts[0]
    assert "6 windows of the validation split" in texts[0]
    assert "Windows of 32 tokens, each 16 behind the one before it, no token added to any: 6" in texts[0]
    for where in ("models.1.samples.1.continuation", "models.0.samples.0.prompt", "protocol.stride"):
        assert f'data-from="{where}"' in texts[1]


def test_beginnings_come_from_the_text(place, tokenizer):
    command = f"{REPORT} --models writer --task_name story.txt --max_length 20 --max_windows 9 --sample_tokens 2"
    assert main(command.split()) == 0
    ids = tokenizer(TEXT * 40)["input_ids"]
    prompts = [tokenizer.decode(ids[20 * place : 20 * place + 16], skip_special_tokens=True) for place in (0, 3, 6)]
    (entry,) = json.loads((place / "report" / "report.json").read_text())["models"]
    assert [sample["prompt"] for sample in entry["samples"]] == prompts
    assert main(f"{command.replace('sample_tokens 2', 'sample_tokens 0')}".split()) == 0
    (entry,) = json.loads((place / "report" / "report.json").read_text())["models"]
    assert entry["samples"] == []
    assert "What the models write" not in (place / "report" / "report.md").read_text()


def test_other_models_write_nothing(place, capsys):
    write_rows(place / "data" / "validation.jsonl", [{"text": "good", "label": 0}, {"text": "bad", "label": 1}])
    command = f"{REPORT} --models judge --data_dir data --max_length 16"
    assert main(command.split()) == 0
    report = json.loads((place / "report" / "report.json").read_text())
    assert (report["protocol"], report["models"][0]["samples"]) == ({}, [])
    assert main(f"{command} --sample_tokens 8".split()) == 2
    assert "sample_tokens must be left out for sequence-classification" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample_tokens", "-1"], "sample_tokens must be at least 0, got -1"),
        (
            ["--sample_tokens", "0", "--sample_prompts", "good"],
            "sample_tokens must be at least 1 where there are prompts",
        ),
        (["--sample_prompts", " "], "sample_prompts is empty"),
        (["--sample_tokens", "64", "--sample_prompts", "good"], "are more than the model's 66 positions ('good')"),
    ],
)
def test_what_cannot_be_written(place, capsys, flags, message):
    command = f"{REPORT} --models writer --task_name story.txt --max_length 32 --max_windows 2"
    assert main([*command.split(), *flags]) == 2
    assert message in capsys.readouterr().err
