"""Compressed models in the hands of other tools: Trainer, pipelines, PEFT, gradient checkpointing."""

import copy

import peft
import pytest
import torch
from transformers import Trainer, pipeline

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from tests.conftest import HEADS
from tests.contract.conftest import CHANGEABLE, assert_same_outputs, logits_of
from tests.pruned_training import arguments, examples
from tests.rounding import differ_beyond_rounding


HEAD = "sequence_classification"


# Models of a smaller vocabulary are stock models of another size.
@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "vocabulary_pruning")) for n in CHANGEABLE])
def method(request):
    """Runs a test once for each method whose models can be trained."""
    return request.param


@pytest.fixture
def labelled(batches):
    """`labelled(config, number)`: single examples of equal length with labels 0 and 1, as Trainer reads them."""

    return lambda config, number=16: examples(config, batches, number)


def test_trainer_checkpoint_opens_and_resumes(compressed, labelled, batch, method, architecture, tmp_path):
    start = compressed(method, architecture, HEAD)
    saving = {"save_strategy": "steps", "save_steps": 2}
    # A stock `Trainer` resumes these with random layers: it looks for tensors under other names than the files have.
    kind = hc.CompressionTrainer if architecture in ("vit", "nomic_bert", "gte") else Trainer
    trainer = kind(
        copy.deepcopy(start), arguments(tmp_path / "a", **saving, max_steps=4), train_dataset=labelled(start.config)
    )
    trainer.train()
    trained = trainer.model
    assert differ_beyond_rounding(logits_of(trained, batch(start))[0], logits_of(start, batch(start))[0])
    reloaded = HEADS[HEAD].from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert_same_outputs(reloaded, trained, batch(start))
    # Resuming from the middle ends where the unbroken run ended.
    again = kind(copy.deepcopy(start), arguments(tmp_path / "b", max_steps=4), train_dataset=labelled(start.config))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_outputs(again.model, trained, batch(start))
    # And a reloaded model is one that Trainer takes.
    Trainer(reloaded, arguments(tmp_path / "c", max_steps=1), train_dataset=labelled(start.config)).train()


def gradients(model, batch):
    model.train()
    model.zero_grad()
    model(**batch, labels=torch.arange(len(next(iter(batch.values())))) % 2).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# The name that every transformers of this major version has; the newest announce another.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing(compressed, batch, method, architecture):
    model = compressed(method, architecture, HEAD)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"transformers cannot checkpoint the gradients of {architecture}")
    plain = gradients(model, batch(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layers_of(model)[0].attention_out.module.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(model, batch(model))
    assert len(calls) == 2  # Once forward, once again for the backward pass.
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_pipeline_after_reload(compressed, tokenizer, sentences, method, tmp_path):
    model = compressed(method, "bert", HEAD)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [text for text, _ in sentences[:4]]
    answers = pipeline("text-classification", model=str(tmp_path), device="cpu")(texts, top_k=None)
    for text, answer in zip(texts, answers, strict=True):
        expected = logits_of(model, tokenizer(text, return_tensors="pt"))[0].softmax(-1)[0]
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx({"LABEL_0": float(expected[0]), "LABEL_1": float(expected[1])}, abs=1e-6)


# peft asks transformers for an attribute that is about to be renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_on_a_compressed_model(compressed, batches, batch, labelled, method, architecture, tmp_path):
    model = compressed(method, architecture, HEAD)
    model.save_pretrained(tmp_path / "base")
    projections = layers_of(model)[0].projections.values()
    targets = sorted({projection.path.rpartition(".")[2] for projection in projections})
    transposed = any(projection.transposed for projection in projections)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, fan_in_fan_out=transposed)
    student = peft.get_peft_model(HEADS[HEAD].from_pretrained(tmp_path / "base"), settings)
    Trainer(student, arguments(tmp_path / "t", max_steps=2), train_dataset=labelled(model.config)).train()
    assert differ_beyond_rounding(logits_of(student, batch(model))[0], logits_of(model, batch(model))[0])
    student.save_pretrained(tmp_path / "adapter")
    base = HEADS[HEAD].from_pretrained(tmp_path / "base")
    assert_same_outputs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), student, batch(model))
    again, data = hc.StructuredPruningConfig(mac_ratio=0.8), batches(model.config)
    with pytest.raises(ValueError, match="must be a plain torch.nn.Linear, got Linear. Merge adapters"):
        hc.compress(student.get_base_model(), again, data=data)
    merged = student.merge_and_unload()
    hc.compress(merged, again, data=data).save_pretrained(tmp_path / "merged")
    assert len(hc.steps_of(merged)) == 2
    reloaded = HEADS[HEAD].from_pretrained(tmp_path / "merged")
    assert_same_outputs(reloaded, merged, batch(model))


def test_training_learns_the_rule(compressed, tokenizer, sentences, method, tmp_path):
    model = compressed(method, "bert", HEAD)
    data = [{**tokenizer(text), "labels": label} for text, label in sentences]
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=2e-3),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    predicted = trainer.predict(data).predictions.argmax(-1)
    assert (predicted == [label for _, label in sentences]).mean() > 0.95
