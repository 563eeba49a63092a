"""The README.md in saved folders: what it says, whose it is, and that the card of a push says what was removed."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.folder_card import steps_with_settings, write_card
from hf_compress.stages.saved import save_stage
from tests.contract.conftest import METHOD_CONFIGS


HEAD = "sequence_classification"


@pytest.fixture
def small(model, batches):
    """A classifier with fewer heads and neurons, and zeros."""
    made = model("bert", HEAD)
    steps = [
        hc.StructuredPruningConfig(mac_ratio=0.6),
        hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude"),
    ]
    return hc.compress(made, *steps, data=batches(made.config))


@pytest.fixture
def trainer(tmp_path, tokenizer, sentences):
    """`trainer(model, kind=hc.CompressionTrainer)`: one that has done one step."""

    def make(model, kind=hc.CompressionTrainer, folder="out"):
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        rows = [{**tokenizer(text), "labels": label} for text, label in sentences[:8]]
        made = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        made.train()
        return made

    return make


def test_what_a_card_says(small, model, tmp_path):
    small.config._name_or_path = "google-bert/bert-base-uncased"
    write_card(tmp_path, small)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.tags == ["hf_compress", "structured_pruning", "weight_pruning"]
    dense = sum(p.numel() for p in model("bert", HEAD).parameters())
    now, nonzero = (sum(int(count(p)) for p in small.parameters()) for count in (torch.numel, torch.count_nonzero))
    assert f"| a dense model of this config | {dense:,} | |" in card.text
    assert f"| this model | {now:,} | {nonzero:,} |" in card.text
    structured, weights = steps_with_settings(small.config)
    assert structured[1]["mac_ratio"] == 0.6
    assert weights == ("weight_pruning", {"pattern": "2:4", "target_sparsity": 0.5, "criterion": "magnitude",
                                          "achieved_sparsity": 0.5})  # fmt: skip
    for text in ("`mac_ratio=0.6`", f"`heads_per_layer={structured[1]['heads_per_layer']}`", "`pattern='2:4'`",
                 "import hf_compress", "arxiv.org/abs/2406.00061", "MISMATCH"):  # fmt: skip
        assert text in card.text


@pytest.mark.parametrize("method", list(METHOD_CONFIGS))
def test_the_lines_of_the_card_open_the_model(model, batches, tokenizer, method, tmp_path):
    made = model("bert", HEAD)
    # Words of the tests' tokenizer are among the 99 of the tests' models.
    hc.compress(made, METHOD_CONFIGS[method](), data=batches(made.config))
    save_stage(tmp_path / "model", made, tokenizer, {"metric": 0.5})
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    code = code.replace("path or name of this model", str(tmp_path / "model"))
    names = {}
    exec(code, names)
    assert hc.steps_of(names["model"]) == hc.steps_of(made)
    assert len(names["tokenizer"]) == len(tokenizer)


def test_the_name_of_the_base_passes_through_folders(small, tmp_path):
    small.config._name_or_path = "google-bert/bert-base-uncased"
    for number in range(2):
        small.save_pretrained(tmp_path / str(number))
        write_card(tmp_path / str(number), small)
        small = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(number))
        assert small.config._name_or_path == str(tmp_path / str(number))
    assert ModelCard.load(tmp_path / "1" / "README.md").data.base_model == "google-bert/bert-base-uncased"
    (tmp_path / "1" / "README.md").write_text("---\nbase_model: mine\n---\nMy own.\n")
    write_card(tmp_path / "0", AutoModelForSequenceClassification.from_pretrained(tmp_path / "1"))
    assert ModelCard.load(tmp_path / "0" / "README.md").data.base_model is None


def test_the_card_of_somebody_else_stays(small, tokenizer, trainer, tmp_path):
    for folder in ("stage", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("---\ntags: [mine]\n---\nMy own words.\n")
    save_stage(tmp_path / "stage", small, tokenizer, {})
    trained = trainer(small)
    trained.save_model()
    trained.create_model_card()
    for folder in ("stage", "out"):
        assert (tmp_path / folder / "README.md").read_text() == "---\ntags: [mine]\n---\nMy own words.\n"
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_saving_again_says_what_is_true_now(model, batches, tokenizer, tmp_path):
    dense = model("bert", HEAD)
    save_stage(tmp_path, dense, tokenizer, {})
    text = (tmp_path / "README.md").read_text()
    assert "has not been compressed" in text
    assert "import hf_compress" not in text
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["hf_compress"]
    save_stage(tmp_path, hc.compress(dense, hc.TokenPruningConfig()), tokenizer, {})
    assert "**token_pruning**" in (tmp_path / "README.md").read_text()


def test_trainers_write_cards(small, trainer, tmp_path):
    trained = trainer(small)
    generator = torch.get_rng_state()
    trained.save_model()
    assert torch.equal(torch.get_rng_state(), generator)
    first = (tmp_path / "out" / "README.md").read_text()
    assert "**structured_pruning**" in first
    trained.create_model_card(model_name="small", tags=["mine"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"mine", "hf_compress", "structured_pruning", "weight_pruning"} <= set(card.data.tags)
    for text in ("`mac_ratio=0.6`", "import hf_compress", "### Training hyperparameters", "# small"):
        assert text in card.text
    # Once more from either: never twice in one card, never refused.
    trained.create_model_card()
    assert ModelCard.load(tmp_path / "out" / "README.md").text.count("## What was done") == 1
    trained.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == first


def test_the_card_of_a_plain_trainer_is_replaced(small, trainer, tmp_path):
    stock = trainer(small, kind=Trainer)
    stock.create_model_card()
    trainer(small).save_model()
    assert "**weight_pruning**" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_that_cannot_be_written_costs_no_model(small, tokenizer, tmp_path, caplog):
    base = tmp_path / "base"
    small.save_pretrained(base)
    write_card(base, small)
    broken = (base / "README.md").read_text().replace("tags:", "tags: [")
    (base / "README.md").write_text(broken)
    again = AutoModelForSequenceClassification.from_pretrained(base)
    save_stage(tmp_path / "stage", again, tokenizer, {})
    assert "README.md of " in caplog.text
    assert (tmp_path / "stage" / "model.safetensors").is_file()


def test_classes_of_somebody_else(small, tmp_path):
    class Own(type(small)):
        def __init__(self, config, more):
            super().__init__(config)

    small.__class__ = Own
    write_card(tmp_path, small)
    text = (tmp_path / "README.md").read_text()
    assert "| this model |" in text
    assert "| a dense model of this config |" not in text


def test_models_of_other_makers_have_no_card(tmp_path):
    write_card(tmp_path, torch.nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())
