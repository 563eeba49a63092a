"""The example of token pruning and the pipelines of transformers run as a person runs them."""

import runpy
import sys
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertForSequenceClassification, pipeline

import hf_compress as hc


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "token_pruning.py"


@pytest.mark.parametrize(("flags", "mode", "stage"), [
    (("--mode", "learned", "--target", "0.7"), "absolute_threshold", "hard"),
    (("--mode", "topk", "--keep_rate", "0.3"), "topk", "hard"),
    (("--mode", "manual", "--threshold", "0.05"), "absolute_threshold", "hard"),
], ids=["learned", "topk", "manual"])  # fmt: skip
def test_the_example(sentences, tokenizer, tmp_path, monkeypatch, capsys, flags, mode, stage):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 32}
    # The example cuts texts at 128 tokens.
    config = BertConfig(vocab_size=99, max_position_embeddings=128, initializer_range=0.2, **sizes)
    BertForSequenceClassification(config).save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    settings = Path("dense/tokenizer_config.json")
    settings.write_text(settings.read_text().replace('"model_max_length": 64', '"model_max_length": 128'))
    Path("data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(f"data/{name}.parquet")
    line = [str(EXAMPLE), "--model", "dense", "--data_dir", "data", "--out", "out", "--max_steps", "4", *flags]
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(f"{flags[1]} {{'eval_accuracy': ")
    found = BertForSequenceClassification.from_pretrained("out")
    assert (found.config.prune_mode, found.config.token_prune_stage) == (mode, stage)
    share = float(printed.rpartition(" ")[2].rstrip("}"))
    assert share == pytest.approx(0.7, abs=0.05) if flags[1] == "learned" else share < 1
    page = Path("out/words.html").read_text()
    assert page.count("<table>") == 3
    assert "class=gone" in page


def test_a_pipeline_labels_every_word(model, tokenizer, tmp_path):
    """A word that was dropped on the way keeps its last value and gets a label all the same."""
    hc.compress(
        model("bert", "token_classification"), hc.TokenPruningConfig(final_token_threshold=0.03)
    ).save_pretrained(tmp_path)
    pruned = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert hc.steps_of(pruned)[0]["method"] == "token_pruning"
    label = pipeline("token-classification", model=pruned, tokenizer=tokenizer, ignore_labels=[])
    short, long = ["the film was good", "the plot was very bad and the cast was quite good"]
    found = label([short, long], batch_size=2)
    assert [[word["word"] for word in words] for words in found] == [text.split() for text in (short, long)]
    alone = label(short)
    assert [word["score"] for word in found[0]] == pytest.approx([word["score"] for word in alone], rel=1e-5)
