"""Whole attention heads as a pattern of weight pruning."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.projections import HEAD_ROLES, Role
from tests.test_weight_pruning_config import tiny_t5


HEAD = "sequence_classification"


def parts(layer):
    """The matrices of a layer's attention, each as [units, rest]: what one unit owns of it."""
    found = [layer.projection(role).weight.detach() for role in layer.projections if role in HEAD_ROLES]
    return [x.reshape(layer.num_units, -1) for x in (*found, layer.attention_out.weight.detach().T)]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_heads_of_least_average_magnitude_go(model, architecture, scope):
    dense = model(architecture, HEAD)
    scores = [torch.stack([x.abs().mean(1) for x in parts(layer)]).mean(0) for layer in layers_of(dense)]
    config = hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, criterion="magnitude", scope=scope)
    pruned = hc.compress(copy.deepcopy(dense), config)
    if scope == "global":
        bound = torch.cat(scores).sort().values[len(torch.cat(scores)) // 2]
        expected = [score < bound for score in scores]
    else:
        expected = [score < score.sort().values[len(score) // 2] for score in scores]
    for before, after, gone in zip(layers_of(dense), layers_of(pruned), expected, strict=True):
        for old, new in zip(parts(before), parts(after), strict=True):
            assert torch.equal(new, torch.where(gone[:, None], 0.0, old))
    assert hc.steps_of(pruned)[-1]["achieved_sparsity"] == pytest.approx(torch.cat(expected).double().mean().item())


def test_slimmed_heads_are_gone(model, batches):
    dense = model("bert", HEAD).double()
    pruned = hc.compress(dense, hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, criterion="magnitude"))
    heads = [layer.num_units for layer in layers_of(pruned)]
    batch = batches(pruned.config, count=1)[0]
    with torch.no_grad():
        expected = pruned(**batch).logits
        slim = hc.slim(copy.deepcopy(pruned))
        torch.testing.assert_close(slim(**batch).logits, expected, rtol=0, atol=1e-10)
    assert sum(layer.num_units for layer in layers_of(slim)) == sum(heads) // 2


def test_a_trainer_prunes_heads_and_resumes(model, sentences, tokenizer, tmp_path):
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences]
    config = hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, start_step=2, end_step=6, pruning_frequency=2)

    def train(folder, resume=None):
        args = TrainingArguments(
            str(tmp_path / folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=8, save_steps=5,
            per_device_train_batch_size=8, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model("bert", HEAD), args, train_dataset=rows, processing_class=tokenizer,
            callbacks=[hc.WeightPruningCallback(config)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = train("whole")
    gone = [torch.stack([(x == 0).all(1) for x in parts(layer)]) for layer in layers_of(whole)]
    assert all(torch.equal(x, x[:1].expand_as(x)) for x in gone), "a head must go from all four matrices"
    units = torch.cat([x[0] for x in gone])
    assert int(units.sum()) == len(units) // 2
    resumed = train("again", str(tmp_path / "whole" / "checkpoint-5"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_what_cannot_lose_heads_is_refused():
    config = hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, criterion="magnitude")
    with pytest.raises(ValueError, match="model_type must be one of bert, .*got 't5'"):
        hc.compress(tiny_t5(), config)
    with pytest.raises(ValueError, match="pattern must be 'N:M' or 'Nx1' with criterion='sparsegpt', got 'mha'"):
        hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, criterion="sparsegpt", scope="local")


def test_only_the_layers_asked_for_lose_heads(model):
    dense = model("bert", HEAD)
    config = hc.WeightPruningConfig(
        pattern="mha", target_sparsity=0.5, criterion="magnitude", op_names=(r"layer\.1\.attention",)
    )
    pruned = hc.compress(copy.deepcopy(dense), config)
    for before, after in zip(layers_of(dense), layers_of(pruned), strict=True):
        same = all(torch.equal(x, y) for x, y in zip(parts(before), parts(after), strict=True))
        assert same == (before.index != 1)


def test_caps_that_put_the_target_out_of_reach(model, sentences, tokenizer, tmp_path):
    """Three of four heads may go in each of three layers, which is less than 0.9 of all."""
    message = r"target_sparsity must be at most 0.75 with max_sparsity_ratio_per_op=0.98, got 0.9: .* 9 of 12"
    config = {"pattern": "mha", "target_sparsity": 0.9, "criterion": "magnitude"}
    dense = model("bert", HEAD)
    with pytest.raises(ValueError, match=message):
        hc.compress(dense, hc.WeightPruningConfig(**config))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=4)
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences]
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(**config))
    with pytest.raises(ValueError, match=message):
        Trainer(dense, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]).train()
    # Three of four in a layer of its own is what 0.9 rounds down to.
    pruned = hc.compress(dense, hc.WeightPruningConfig(**config, scope="local"))
    assert hc.steps_of(pruned)[-1]["achieved_sparsity"] == 0.75


def test_half_frozen_attention_is_refused(model, sentences, tokenizer, tmp_path):
    student = model("bert", HEAD)
    frozen = layers_of(student)[1].projection(Role.VALUE).module
    frozen.weight.requires_grad_(False)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=4)
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences]
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(pattern="mha", target_sparsity=0.5, start_step=1))
    trainer = Trainer(student, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    with pytest.raises(ValueError, match=r"attention projections trained, frozen: .*layer\.1\..*value"):
        trainer.train()
