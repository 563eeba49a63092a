"""Weight pruning that resumes from a checkpoint ends as the unbroken run."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import hf_compress as hc
from tests.pruned_training import HEAD, SMALL, arguments, examples, pruning_trainer


# What is resumed lies in the optimizer's state and does not depend on the trainer; the writing of checkpoints does.
SETTINGS = [
    (Trainer, {}),
    (hc.CompressionTrainer, {"progressive": True, "pruning_frequency": 5, "criterion": "magnitude", "scope": "local"}),
]
MORE = [
    (hc.CompressionTrainer, {}),
    (Trainer, {"pattern": "2:4", "target_sparsity": 0.5}),
    (hc.CompressionTrainer, {"criterion": "magnitude", "scope": "local"}),
    (hc.CompressionTrainer, {"criterion": "snip"}),
    (Trainer, {"progressive": True, "pruning_frequency": 5, "reg_type": "group_lasso", "reg_coeff": 0.1}),
    (
        hc.CompressionTrainer,
        {"progressive": True, "pruning_frequency": 4, "criterion": "snip", "pattern": "2:4", "target_sparsity": 0.5},
    ),
    (Trainer, {"reg_type": "group_lasso_gradient", "reg_coeff": 1e-4}),
]


@pytest.mark.parametrize(
    ("kind", "changes"), [*SETTINGS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_resumed_equals_unbroken(model, batches, tmp_path, kind, changes):
    dense = model("bert", HEAD)
    data, config = examples(dense.config, batches), {**SMALL, **changes}
    saving = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    whole, _ = pruning_trainer(copy.deepcopy(dense), tmp_path / "whole", data, config, kind, **saving)
    whole.train()
    for step in (1, 4, 5, 7, 10, 11, 13):
        start = copy.deepcopy(dense)
        if step % 2:
            start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        again, watch = pruning_trainer(start, tmp_path / "again", data, config, kind, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(watch.seen) == 14 - step
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (step, name)
        for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            ours, reference = again.optimizer.state[mine], whole.optimizer.state[theirs]
            assert ours.keys() == reference.keys()
            assert all(torch.equal(ours[key], reference[key]) for key in reference), step
            assert ours.get("pruned", torch.ones(1, dtype=torch.bool)).dtype == torch.bool
        assert hc.steps_of(again.model) == hc.steps_of(whole.model)
        assert len(hc.steps_of(whole.model)) == 1


def test_a_step_with_its_schedule_is_recognised(model, batches, tmp_path):
    """As older versions wrote it into checkpoints: resuming from one does not record the step twice."""
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    saving = {"save_strategy": "steps", "save_steps": 12}
    whole, _ = pruning_trainer(copy.deepcopy(dense), tmp_path / "whole", data, SMALL, **saving)
    whole.train()
    file = tmp_path / "whole" / "checkpoint-12" / "config.json"
    config = json.loads(file.read_text())
    (step,) = config["quantization_config"]["steps"]
    assert "end_step" not in step
    step.update({name: SMALL[name] for name in ("pruning_frequency", "start_step", "end_step")})
    file.write_text(json.dumps(config))
    start = AutoModelForSequenceClassification.from_pretrained(file.parent)
    assert hc.steps_of(start)[0]["end_step"] == 10
    again, _ = pruning_trainer(start, tmp_path / "again", data, SMALL)
    again.train(resume_from_checkpoint=str(file.parent))
    assert hc.steps_of(again.model) == hc.steps_of(whole.model)


def test_a_checkpoint_without_optimizer_is_refused(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    saving = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, **saving)
    trainer.train()
    again, _ = pruning_trainer(copy.deepcopy(dense), tmp_path / "again", data, SMALL)
    with pytest.raises(ValueError, match="resume_from_checkpoint must hold the optimizer's state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


class Wake(TrainerCallback):
    """A layer that takes part from step 8 on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.awake = model, False
        model.classifier.register_forward_pre_hook(self.run)

    def on_step_begin(self, args, state, control, **kwargs):
        self.awake = state.global_step >= 8

    def run(self, module, inputs):
        return (inputs[0] + self.model.bert.encoder.layer[1].spare(inputs[0]),) if self.awake else None


def test_a_layer_that_is_reached_late(model, batches, tmp_path):
    """By magnitude it is pruned long before the optimizer has a state of it, also after a resume in between."""
    dense = model("bert", HEAD)
    dense.bert.encoder.layer[1].spare = nn.Linear(32, 32)
    data, config = examples(dense.config, batches), {**SMALL, "criterion": "magnitude", "end_step": 4}

    def train(folder, resume=None):
        callbacks = [hc.WeightPruningCallback(hc.WeightPruningConfig(**config)), Wake()]
        args = arguments(folder, save_strategy="steps", save_steps=6, optim="adamw_torch")
        trainer = Trainer(copy.deepcopy(dense), args, train_dataset=data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path)
    weight = whole.model.bert.encoder.layer[1].spare.weight
    before = dense.bert.encoder.layer[1].spare.weight
    assert 0 < int((weight == 0).sum()) < weight.numel()
    assert not torch.equal(weight[weight != 0], before[weight != 0])
    again = train(tmp_path / "again", str(tmp_path / "checkpoint-6"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
