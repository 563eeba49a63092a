"""Dropout of a model that is already built, against the model in evaluation and against a reopened one."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_compress.cli.main import main
from hf_compress.core.dropout import set_dropout_
from tests.conftest import HEADS


def states(model, batch, seed=0):
    torch.manual_seed(seed)
    return model(**batch)[0]


def test_without_dropout_training_computes_what_evaluation_does(architecture, model, batches):
    made = model(architecture)
    if hasattr(made.config, "layerdrop"):
        made.config.layerdrop = 0.0
    # Masks of time steps in training are no dropout.
    made.config.apply_spec_augment = False
    (batch, *_) = batches(made.config, count=1)
    expected = states(made, batch)
    set_dropout_(made.train(), 0.5)
    assert not torch.allclose(states(made, batch), states(made, batch, seed=1))
    set_dropout_(made, 0.0)
    torch.testing.assert_close(states(made, batch), expected)


def test_the_command_sets_it_and_the_saved_model_keeps_it(tmp_path, monkeypatch, model, tokenizer, sentences):
    model("bert", "sequence_classification").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(f"{text},{label}\n" for text, label in sentences)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}")
    monkeypatch.chdir(tmp_path)
    line = "finetune --model_name_or_path model --data_dir . --max_length 32 --max_steps 1 --dropout 0.3"
    assert main([*line.split(), "--output_dir", "out"]) == 0
    made = HEADS["sequence_classification"].from_pretrained("out")
    assert made.config.hidden_dropout_prob == made.config.attention_probs_dropout_prob == 0.3
    assert {module.p for module in made.modules() if isinstance(module, nn.Dropout)} == {0.3}


def test_an_unset_probability_of_the_head_stays_unset():
    model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=24, classifier_dropout=None))
    set_dropout_(model, 0.25)
    assert model.config.classifier_dropout is None
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.25


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan")])
def test_no_probability_is_refused(wrong):
    model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=24))
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got"):
        set_dropout_(model, wrong)
    assert model.config.to_dict() == before
