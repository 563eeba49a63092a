"""`hf-compress prune-vocabulary`: one folder that AutoModel and AutoTokenizer open, or one line."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_compress as hc
from hf_compress.cli.main import main
from tests.images_and_sounds import opens_images
from tests.rounding import assert_equal_to_rounding
from tests.test_vocabulary_pruning import CORPUS, SIZES, wordpiece


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model, its tokenizer and a corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    tokenizer = wordpiece(tmp_path / "model")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES)
    BertForSequenceClassification(config).save_pretrained("model")
    (tmp_path / "texts.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    return tmp_path


def test_one_command_gives_one_folder(folder, capsys):
    command = "prune-vocabulary --model_name_or_path model --corpus texts.txt --output_dir out"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    results = json.loads((folder / "out" / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert f"{before['tokens']:14,d}{after['tokens']:14,d}" in printed
    assert f"{len(set(CORPUS)):,d} texts read" in printed
    model = AutoModelForSequenceClassification.from_pretrained("out").eval()
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert len(tokenizer) == model.config.vocab_size == after["tokens"] < before["tokens"]
    assert before["params"] - after["params"] == 16 * (before["tokens"] - after["tokens"])
    dense, old = (
        AutoModelForSequenceClassification.from_pretrained("model").eval(),
        AutoTokenizer.from_pretrained("model"),
    )
    with torch.no_grad():
        found, expected = (
            m(**t(CORPUS, padding=True, return_tensors="pt")).logits for m, t in ((model, tokenizer), (dense, old))
        )
    assert_equal_to_rounding(found, expected)
    card = (folder / "out" / "README.md").read_text()
    assert "vocabulary_pruning" in card
    assert max(map(len, card.splitlines())) < 1000
    # The next command takes the folder as any other.
    rows = [{"sentence": text, "label": index % 2} for index, text in enumerate(CORPUS)]
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prune = "prune-structure --model_name_or_path out --data_dir data --output_dir cut --calibration_samples 16"
    assert main([*prune.split(), "--mac_ratio", "0.9", "--max_length", "32", "--device", "cpu"]) == 0
    cut = AutoModelForSequenceClassification.from_pretrained("cut")
    assert [step["method"] for step in hc.steps_of(cut)] == ["vocabulary_pruning", "structured_pruning"]
    assert AutoTokenizer.from_pretrained("cut").get_vocab() == tokenizer.get_vocab()


def test_an_encoder_alone_keeps_what_lies_beside_it(folder):
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in parts]
    BertModel.from_pretrained("model").save_pretrained("encoder")
    AutoTokenizer.from_pretrained("model").save_pretrained("encoder")
    (folder / "encoder" / "modules.json").write_text(json.dumps(modules))
    (folder / "encoder" / "1_Pooling").mkdir()
    (folder / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    command = "prune-vocabulary --model_name_or_path encoder --corpus texts.txt --output_dir out --min_count 2"
    assert main([*command.split(), "--characters", "corpus"]) == 0
    (step,) = hc.steps_of(BertModel.from_pretrained("out"))
    assert (step["min_count"], step["characters"], step["corpus"]) == (2, "corpus", ["texts.txt"])
    assert json.loads((folder / "out" / "modules.json").read_text()) == modules
    assert (folder / "out" / "1_Pooling" / "config.json").is_file()


MODEL = "--model_name_or_path model --output_dir out"
BAD = {
    MODEL: "corpus must name files of texts, got none",
    f"{MODEL} --corpus none.txt": "corpus 'none.txt' must exist and be a file of texts",
    f"{MODEL} --corpus none.csv": "corpus 'none.csv' must exist",
    f"{MODEL} --corpus empty.txt": "must hold at least one text, got none in 'empty.txt'",
    f"{MODEL} --corpus binary.txt": "corpus 'binary.txt' is not text in UTF-8",
    f"{MODEL} --corpus texts.txt --min_count 0": "min_count must be at least 1",
    "--model_name_or_path model --output_dir model --corpus texts.txt": "is the folder of model_name_or_path",
}


def test_bad_input_is_one_line(folder, capsys):
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for flags, message in BAD.items():
        assert main(["prune-vocabulary", *flags.split()]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
        assert not (folder / "out").exists()


@opens_images
def test_images_have_no_words(folder, capsys):
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained("image")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("image")
    command = "prune-vocabulary --model_name_or_path image --corpus texts.txt --output_dir out"
    assert main(command.split()) == 2
    assert "model must have word embeddings, got ViTForImageClassification" in capsys.readouterr().err
