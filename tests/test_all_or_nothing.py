"""Compression that fails or is interrupted midway leaves the model as it was, and writes into no shared config."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

import hf_compress as hc
from hf_compress.core.own_config import own_config_
from hf_compress.core.rollback import restored_on_failure
from hf_compress.methods.weight_pruning import slimming
from tests.rounding import assert_compressed_alike, assert_equal_to_rounding, differ_beyond_rounding


HEAD = "sequence_classification"
SPARSEGPT = {"pattern": "2:4", "target_sparsity": 0.5, "criterion": "sparsegpt", "scope": "local"}
# What takes several passes, or several steps.
STEPS = {
    "one shot": [hc.StructuredPruningConfig(mac_ratio=0.6)],
    "sequential": [hc.StructuredPruningConfig(mac_ratio=0.6, order="sequential")],
    "fisher": [hc.StructuredPruningConfig(mac_ratio=0.6, selection="fisher")],
    "sparsegpt": [hc.WeightPruningConfig(**SPARSEGPT)],
    "linear, then smaller": [hc.LinformerConfig(projected_length=4, max_tokens=80),
                             hc.StructuredPruningConfig(mac_ratio=0.6)],
    "sparse, then tokens, then smaller": [
        hc.WeightPruningConfig(target_sparsity=0.5, pattern="1x1", criterion="magnitude"), hc.TokenPruningConfig(),
        hc.StructuredPruningConfig(mac_ratio=0.6, order="sequential"),
    ],
}  # fmt: skip


class Failing:
    """Batches that raise when the given batch is read, counted over all passes."""

    def __init__(self, batches, at, error):
        self.batches, self.at, self.error, self.read = batches, at, error, 0

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.at:
                raise self.error
            self.read += 1
            yield batch


def everything(model):
    """Objects and values of a model: identities of modules, parameters and buffers, classes, modes, values, config."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    tensors = {
        name: (id(value), value.requires_grad, value.data_ptr(), value.detach().clone().numpy().tobytes())
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    implementation = model.config._attn_implementation
    return modules, attributes, hooks, tensors, implementation, id(model.config), model.config.to_dict()


@pytest.mark.parametrize("name", list(STEPS))
def test_interrupted_at_any_batch(model, batches, name):
    dense = model("bert", HEAD).train()
    dense.bert.encoder.layer[1].eval()
    dense.bert.pooler.dense.weight.requires_grad_(False)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=3)]
    unbroken = Failing(data, -1, None)
    expected = hc.compress(copy.deepcopy(dense), *STEPS[name], data=unbroken)
    before = everything(dense)
    for at, error in (
        (1, KeyboardInterrupt),
        (unbroken.read // 2, KeyboardInterrupt),
        (unbroken.read - 1, MemoryError),
    ):
        failing = Failing(data, at, error)
        with pytest.raises(error):
            hc.compress(dense, *STEPS[name], data=failing)
        assert failing.read == at
        assert everything(dense) == before
    # And it works as if nothing had happened.
    hc.compress(dense, *STEPS[name], data=data)
    assert_compressed_alike(dense, expected)


def test_activations_that_overflow_late(model, batches):
    dense = model("bert", HEAD)
    dense.bert.encoder.layer[2].output.LayerNorm.weight.data.fill_(3e38)
    before = everything(dense)
    config = hc.WeightPruningConfig(**SPARSEGPT, op_names=[".*query", ".*pooler.dense"])
    with pytest.raises(ValueError, match="Activations must be finite|one row a token"):
        hc.compress(dense, config, data=batches(dense.config, count=2))
    assert everything(dense) == before


def test_slimming_is_done_or_not(model, monkeypatch):
    config = hc.WeightPruningConfig(
        pattern="1xchannel", target_sparsity=0.5, criterion="magnitude", op_names=["intermediate.dense"], scope="local"
    )
    sparse = hc.compress(model("bert", HEAD), config)
    before, calls = everything(sparse), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = slimming.keep_neurons_
    monkeypatch.setattr(slimming, "keep_neurons_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hc.slim(sparse)
    assert len(calls) == 2
    assert everything(sparse) == before


def test_hooks_can_still_be_removed(model):
    dense = model("bert")
    handle = dense.encoder.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(AttributeError), restored_on_failure(dense):
        assert dense.encoder.register_forward_pre_hook(lambda *_: None).nothing
    assert len(dense.encoder._forward_pre_hooks) == 1
    handle.remove()
    assert not dense.encoder._forward_pre_hooks


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}
ONE_STEP = {
    "structured": lambda: hc.StructuredPruningConfig(mac_ratio=0.8),
    "linear": lambda: hc.LinformerConfig(projected_length=4, max_tokens=600),
    "tokens": lambda: hc.TokenPruningConfig(),
    "weights": lambda: hc.WeightPruningConfig(target_sparsity=0.5, criterion="magnitude"),
}


@pytest.mark.parametrize("name", list(ONE_STEP))
def test_two_models_of_one_config(name, batches):
    config = BertConfig(**SIZES)
    student, teacher = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    # Whether transformers hands the object itself on depends on its version.
    for one in (student, teacher):
        for module in one.modules():
            if hasattr(module, "config"):
                module.config = config
    before = config.to_dict()
    hc.compress(student, ONE_STEP[name](), data=batches(config))
    assert len(hc.steps_of(student)) == 1
    assert hc.steps_of(teacher) == []
    assert config.to_dict() == before
    assert teacher.config is config
    assert {id(m.config) for m in student.modules() if hasattr(m, "config")} == {id(student.config)}
    student(**batches(config, count=1)[0])
    teacher(**batches(config, count=1)[0])


def test_rules_of_token_layers_follow_the_config(model, batches):
    """A second step gives the model another config object; layers that read it at every pass must see that one."""
    pruned = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(final_token_threshold=0.014))
    shared = pruned.config
    own_config_(pruned)
    assert pruned.config is not shared
    batch = batches(pruned.config, count=1)[0]
    with torch.no_grad():
        before = pruned(**batch).logits
        shared.score_norm, shared.score_reference_length = "live", 3
        assert_equal_to_rounding(pruned(**batch).logits, before)
        pruned.config.score_reference_length = 3
        assert differ_beyond_rounding(pruned(**batch).logits, before)


def test_the_pruning_callback_writes_into_its_own_config(batches, tmp_path):
    config = BertConfig(**SIZES)
    student, teacher = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    for one in (student, teacher):
        one.config = config
    pruning = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, start_step=1, end_step=2, pruning_frequency=1)
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(batches(config, 1)[0]["input_ids"])]
    args = hc.DistillationArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = hc.DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=rows,
        callbacks=[hc.WeightPruningCallback(pruning)],
    )  # fmt: skip
    trainer.train()
    assert len(hc.steps_of(trainer.model)) == 1
    assert hc.steps_of(teacher) == hc.steps_of(config) == []
