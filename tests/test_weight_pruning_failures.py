"""Weight pruning that cannot succeed says so: early ends, regrown weights, steps that mixed precision skips."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_compress as hc
from tests.pruned_training import HEAD, SMALL, StopAt, examples, pruning_trainer


class Regrow(TrainerCallback):
    """Something else that touches the weights in the last step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            model.bert.encoder.layer[0].output.dense.weight.data.add_(1)


class GiveUpAt(TrainerCallback):
    """What Trainer does when Optuna prunes a trial."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            self.trainer.callback_handler.on_train_end(args, state, control)
            raise InterruptedError


def test_a_trial_that_a_search_gives_up(model, batches, tmp_path, caplog):
    dense, search = model("bert", HEAD), GiveUpAt()
    search.trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), SMALL, extra=[search])
    with pytest.raises(InterruptedError):
        search.trainer.train()
    assert "ended after 7 steps, before the last pruning update at step 10" in caplog.text
    # A trial that a callback ends, or that ends by itself, is judged like any other training.
    trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), SMALL, extra=[StopAt(6), search])
    with pytest.raises(ValueError, match="ended after 6 steps"):
        trainer.train()


def test_no_silent_success(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, extra=[StopAt(7)])
    with pytest.raises(ValueError, match="ended after 7 steps, before the last pruning update at step 10"):
        trainer.train()
    assert hc.steps_of(trainer.model) == []
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, extra=[Regrow()])
    with pytest.raises(ValueError, match=r"target_sparsity=0.9 was not kept: \d+ of \d+ units of pattern 4x1"):
        trainer.train()
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, {**SMALL, "end_step": 14})
    trainer.train()  # The last update, at step 13, still fits.
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, {**SMALL, "end_step": 16})
    with pytest.raises(ValueError, match="must leave room for the schedule"):
        trainer.train()
    frozen = copy.deepcopy(dense)
    frozen.bert.requires_grad_(False)
    trainer, _ = pruning_trainer(frozen, tmp_path, data, SMALL)
    with pytest.raises(ValueError, match="op_names must select weights that are trained"):
        trainer.train()
    foreign = copy.deepcopy(dense)
    foreign.config.quantization_config = {"quant_method": "bitsandbytes"}
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL)
    trainer.model.config = foreign.config
    with pytest.raises(ValueError, match="quantization_config must be empty or of hf_compress"):
        trainer.train()
    with pytest.raises(ValueError, match="config must be a WeightPruningConfig, got StructuredPruningConfig"):
        hc.WeightPruningCallback(hc.StructuredPruningConfig())


def test_weights_without_gradient_are_left_alone(model, batches, tmp_path, caplog):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    dense.bert.encoder.layer[0].output.dense.requires_grad_(False)
    # The last layer's output counts at position 0 only, yet all its weights get gradients; a side branch gets none.
    dense.bert.encoder.layer[1].spare = nn.Linear(8, 8)
    before = copy.deepcopy(dense.state_dict())
    trainer, _ = pruning_trainer(dense, tmp_path, data, SMALL)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "because not trained: bert.encoder.layer.0.output.dense (8.3% of the selected weights)" in caplog.text
    assert "because no gradient reaches them: bert.encoder.layer.1.spare (0.3% of the selected" in caplog.text
    # What is told is the share of all weights that were to be pruned.
    (step,) = hc.steps_of(trainer.model)
    assert step["achieved_sparsity"] == pytest.approx(0.9 * (1 - 2112 / 24640), abs=0.002)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.spare.weight"):
        assert torch.equal(trainer.model.state_dict()[name], before[name])


class ScaledTrainer(Trainer):
    """Mixed precision on the CPU but for the precision: losses are scaled, steps with infinite gradients skipped.

    Args:
        overflows: Steps in which a gradient becomes infinite.
    """

    overflows = ()

    def create_optimizer(self, model=None):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return super().create_optimizer(model)

    def training_step(self, model, *args, **kwargs):
        self.accelerator.native_amp = True  # Not earlier, or the model would run in bfloat16.
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step in self.overflows:
            model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = torch.inf
        return loss


@pytest.fixture
def mixed_precision(monkeypatch):
    # What makes `clip_grad_norm_` unscale; a real one is refused on the CPU.
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")


def test_scores_are_of_unscaled_gradients(model, batches, tmp_path, mixed_precision):
    """`Trainer` undoes the scale whether it clips or not."""
    data = examples(model("bert", HEAD).config, batches)
    for norm in (0.0, 1e9):
        results = []
        for kind in (Trainer, ScaledTrainer):
            settings = {"max_grad_norm": norm, "optim": "sgd", "learning_rate": 0.0}
            trainer, _ = pruning_trainer(model("bert", HEAD), tmp_path, data, SMALL, kind, **settings)
            trainer.train()
            weight = trainer.model.bert.encoder.layer[1].output.dense.weight
            results.append(trainer.optimizer.state[weight]["prune_score"])
        assert trainer.accelerator.scaler.get_scale() == 1024
        assert torch.allclose(*results, rtol=1e-5)


@pytest.mark.parametrize(("criterion", "optim"), [("snip", "adamw_torch_fused"), ("snip_momentum", "adamw_torch")])
def test_an_update_waits_while_steps_are_skipped(model, batches, tmp_path, mixed_precision, criterion, optim, caplog):
    dense = model("bert", HEAD)
    config = {"sparsity_decay_type": "oneshot", "start_step": 2, "criterion": criterion, "target_sparsity": 0.5}
    data = examples(dense.config, batches)
    for overflows, reached in (((0, 1, 2), 0.5), (range(14), 0.0)):
        trainer, watch = pruning_trainer(copy.deepcopy(dense), tmp_path, data, config, ScaledTrainer, optim=optim)
        trainer.overflows = overflows
        if reached:
            trainer.train()
            assert hc.steps_of(trainer.model)[0]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
        else:
            with pytest.raises(ValueError, match="ended after 14 steps, before the last pruning update at step 2"):
                trainer.train()
        assert "mixed precision skipped the last one" in caplog.text
        assert watch.seen == pytest.approx([0.0] * 4 + [reached] * 10, abs=0.01)


class Scaled:
    """An optimizer in mixed precision, which skips steps with infinite gradients and then halves the scale."""

    def __init__(self, optimizer):
        self.param_groups, self.state, self.scale = optimizer.param_groups, optimizer.state, 1024.0
        self.scaler = SimpleNamespace(get_scale=lambda: self.scale)


def test_skipped_steps_leave_no_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    weight, gradient = net[0].weight, torch.rand(8, 8)
    args, state = SimpleNamespace(), SimpleNamespace(global_step=0, max_steps=9, num_train_epochs=1)
    optimizer = Scaled(torch.optim.SGD(net.parameters(), lr=0.0))
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(pattern="1x1", pruning_frequency=2))
    callback.on_train_begin(args, state, None, model=net, optimizer=optimizer)
    weight.grad = gradient
    callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    assert "prune_score" not in optimizer.state[weight]  # Never before the optimizer's own first entry.
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    expected = (weight.detach() * gradient).abs()
    assert torch.allclose(optimizer.state[weight]["prune_score"], expected)
    weight.grad = torch.full_like(weight, float("inf"))
    callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    optimizer.scale = 512.0
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    assert torch.allclose(optimizer.state[weight]["prune_score"], expected)
