"""Models whose files name tensors differently from the modules in memory resume as all others do."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import hf_compress as hc
from hf_compress.training.saved_names import accept_saved_names_
from tests.stopping import Stop, train_with_stops


def vit(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(32, 3, 16, 16, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [i % 2 for i in range(32)]}).with_format(
        "torch"
    )


def arguments(folder, kind=TrainingArguments, **changes):
    return kind(str(folder), max_steps=6, report_to="none", learning_rate=1e-2, disable_tqdm=True, **changes)


@pytest.mark.parametrize("kind", ["labels", "fixed teacher", "learning teacher"])
def test_resumed_is_unbroken(images, tmp_path, kind):
    def trainer_of(folder, number, stop):
        # Begun anew from other random weights: all that counts must come out of the checkpoint.
        student, stops = vit(number), [Stop(stop)] if stop else []
        common = {"model": student, "train_dataset": images, "callbacks": stops}
        if kind == "labels":
            return hc.CompressionTrainer(args=arguments(folder, save_strategy="no"), **common)
        trainer, kind_of_arguments = (
            (hc.DistillationTrainer, hc.DistillationArguments)
            if kind == "fixed teacher"
            else (hc.JointTeacherTrainer, hc.JointTeacherArguments)
        )
        args = arguments(folder, kind_of_arguments, save_strategy="no", alpha_layer=1.0)
        return trainer(teacher_model=vit(7), args=args, **common)

    whole = trainer_of(tmp_path / "whole", 0, 0)
    whole.train()
    parts = train_with_stops(
        lambda number, stop: trainer_of(tmp_path / "parts", number, stop), tmp_path / "parts", [2, 4]
    )
    for (name, expected), found in zip(
        whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_the_best_model_comes_back(images, tmp_path):
    student = vit()
    args = arguments(
        tmp_path, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True
    )
    trainer = hc.CompressionTrainer(student, args, train_dataset=images, eval_dataset=images)
    trainer.train()
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(found, value) for found, value in zip(student.parameters(), best.parameters(), strict=True))


def test_what_a_file_lacks_stays_missing(tmp_path):
    vit().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in saved if name.endswith("output.dense.bias"))
    model = vit(1)
    before = copy.deepcopy(model.state_dict())
    accept_saved_names_(model)
    accept_saved_names_(model)
    result = model.load_state_dict({name: value for name, value in saved.items() if name != lost}, strict=False)
    (missing,) = result.missing_keys
    assert not result.unexpected_keys
    after, whole = model.state_dict(), vit().state_dict()
    assert torch.equal(after[missing], before[missing])
    assert all(torch.equal(after[name], whole[name]) for name in whole.keys() - {missing})
