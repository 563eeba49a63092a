"""Callbacks that meet in one training: several that prune weights, and one that comes after the constructor."""

import copy

import pytest
import torch
from transformers import Trainer

import hf_compress as hc
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.methods.weight_pruning.sparsity import sparsity_by_layer
from tests.pruned_training import HEAD, StopAt, arguments, examples


BEFORE = hc.WeightPruningConfig(criterion="magnitude", pattern="1x1", target_sparsity=0.5)
COMMON = {"pattern": "1x1", "target_sparsity": 0.3, "pruning_frequency": 3, "start_step": 1, "end_step": 10}
PARTS = {"attention": [".*attention"], "feed-forward": [".*intermediate", "layer.[0-9]+.output"]}


def configs(**changes):
    return {part: hc.WeightPruningConfig(**{**COMMON, **changes}, op_names=PARTS[part]) for part in PARTS}


def trained(model, folder, data, callbacks, kind=Trainer, resume=None, **changes):
    kind(model, arguments(folder, **changes), train_dataset=data, callbacks=callbacks).train(
        resume_from_checkpoint=resume
    )
    return model


@pytest.mark.parametrize("criterion", ["snip_momentum", "magnitude"])
def test_two_callbacks_decide_each_about_its_own_weights(model, batches, tmp_path, criterion):
    """As one callback with two local configs does; a model that was pruned before gets no old zeros back."""
    dense = hc.compress(model("bert", HEAD), BEFORE)
    data, both = examples(dense.config, batches), configs(criterion=criterion)
    together = trained(
        copy.deepcopy(dense), tmp_path / "two", data, [hc.WeightPruningCallback(config) for config in both.values()]
    )
    local = tuple({"op_names": names} for names in PARTS.values())
    single = hc.WeightPruningConfig(**COMMON, criterion=criterion, local_configs=local)
    alone = trained(copy.deepcopy(dense), tmp_path / "one", data, [hc.WeightPruningCallback(single)])
    for (name, ours), (_, theirs) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for config in both.values():
        found = sparsity_by_layer(together, config)
        assert sum(found.values()) / len(found) < 0.4
    # One step each, however often it was written.
    steps = hc.steps_of(together)
    assert [step.get("op_names") for step in steps] == [None, *PARTS.values()]


def test_held_zeros_leave_what_is_decided_anew(model, batches, tmp_path):
    dense = hc.compress(model("bert", HEAD), BEFORE)
    data, config = examples(dense.config, batches), configs()["attention"]
    pruning = hc.WeightPruningCallback(config)
    alone = trained(copy.deepcopy(dense), tmp_path / "alone", data, [pruning])
    for callbacks in ([pruning, hc.HeldZerosCallback()], [hc.HeldZerosCallback(), pruning]):
        beside = trained(copy.deepcopy(dense), tmp_path / "beside", data, callbacks)
        for (name, ours), (_, theirs) in zip(beside.named_parameters(), alone.named_parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_two_callbacks_for_one_weight_are_refused(model, batches, tmp_path):
    config = hc.WeightPruningConfig(**COMMON)
    callbacks = [hc.WeightPruningCallback(config), hc.WeightPruningCallback(configs()["attention"])]
    dense = model("bert", HEAD)
    with pytest.raises(ValueError, match="Two WeightPruningCallbacks select bert.encoder.layer.0.attention"):
        trained(dense, tmp_path, examples(dense.config, batches), callbacks)
    # What was refused does not stand in the way of the next training.
    trained(dense, tmp_path, examples(dense.config, batches), callbacks[:1])


def test_a_run_of_two_callbacks_resumes(model, batches, tmp_path):
    dense = hc.compress(model("bert", HEAD), BEFORE)
    data = examples(dense.config, batches)

    def run(folder, extra=(), **options):
        callbacks = [hc.WeightPruningCallback(config) for config in configs().values()]
        saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 5}
        return trained(copy.deepcopy(dense), folder, data, [*callbacks, *extra], **saving, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(ValueError, match="before the last pruning update"):
        run(tmp_path / "cut", [StopAt(8)])
    again = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-8"))
    for (name, ours), (_, theirs) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert hc.steps_of(again) == hc.steps_of(whole)


@pytest.mark.parametrize("kind", ["group_lasso", "group_lasso_gradient"])
def test_a_regulariser_that_prunes_more_than_asked_for_is_refused(model, batches, tmp_path, kind):
    """It says so at the next update, not with a sparsity of 1.0 at the end."""
    dense = model("bert", HEAD)
    config = hc.WeightPruningConfig(
        pattern="4x1",
        target_sparsity=0.5,
        pruning_frequency=3,
        start_step=1,
        end_step=10,
        reg_type=kind,
        reg_coeff=1e4,
    )
    with pytest.raises(ValueError, match=r"reg_coeff=10000 is too large: group_lasso\w* has made \d+ of \d+ units"):
        trained(dense, tmp_path, examples(dense.config, batches), [hc.WeightPruningCallback(config)])


def test_zeros_of_an_earlier_step_are_not_blamed_on_the_regulariser(model, batches, tmp_path):
    pruned = hc.compress(model("bert", HEAD), hc.WeightPruningConfig(criterion="magnitude", target_sparsity=0.9))
    config = hc.WeightPruningConfig(
        target_sparsity=0.5, pruning_frequency=3, start_step=1, end_step=10, reg_type="group_lasso", reg_coeff=1e-4
    )
    trained(pruned, tmp_path, examples(pruned.config, batches), [hc.WeightPruningCallback(config)])
    assert hc.steps_of(pruned)[-1]["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("stop", [4, 10])
def test_a_stage_switch_that_comes_after_the_constructor_resumes(model, batches, tmp_path, stop):
    """Before and behind the switch, ends with the same bits; also with a rate of their own for the thresholds."""

    def run(folder, resume=None, stop_at=None):
        soft = hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.03)
        pruned = hc.compress(model("bert", HEAD), soft)
        data = examples(pruned.config, batches)
        saving = {"save_strategy": "steps", "save_steps": stop, "max_steps": 14, "learning_rate": 1e-3}
        trainer = hc.CompressionTrainer(pruned, arguments(folder, **saving), train_dataset=data)
        trainer.add_callback(hc.ThresholdAnnealingCallback(lambda_threshold=0.1, learning_rate=1e-4))
        trainer.add_callback(hc.StageSwitchCallback(0.5))
        if stop_at:
            trainer.add_callback(StopAt(stop_at))
        trainer.train(resume_from_checkpoint=resume)
        return pruned

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=stop)
    again = run(tmp_path / "cut", resume=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert torch.equal(thresholds_of(again).values, thresholds_of(whole).values)
    for (name, ours), (_, theirs) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
