"""Hyperparameter searches over compression: every trial equals a training of its own with the values it drew."""

from __future__ import annotations

import dataclasses
import gc
import warnings

import optuna
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad


ROWS = [Rows()[index] for index in range(16)]
PRUNING = hc.WeightPruningConfig(pattern="2x1", pruning_frequency=1, start_step=1, end_step=2)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    gc.freeze()
    yield
    gc.unfreeze()


def bert(seed, layers=1):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    ))  # fmt: skip


class Drawn(TrainerCallback):
    """Remembers the objective's evaluation, and stops a trial where a test wants that."""

    def __init__(self):
        self.losses, self.fail = [], lambda trainings: False

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses.append(None)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.fail(len(self.losses)):
            raise ValueError("this trial fails")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses[-1] = metrics["eval_loss"]


def pruning(folder, drawn, values=None, **options):
    callback = hc.WeightPruningCallback(PRUNING)

    def init(trial):
        given = values or ({"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)} if trial else {})
        callback.config = dataclasses.replace(PRUNING, **given)
        return bert(0)

    return build(CompressionTrainer, hc.DistillationArguments, folder, init, [drawn, callback], **options)


def structure(folder, drawn, values=None, **options):
    """How much is cut away before each trial; the students of the trials differ in size."""
    data = [pad(ROWS)]

    def init(trial):
        given = values or ({"mac_ratio": trial.suggest_float("mac_ratio", 0.3, 0.9)} if trial else {})
        return hc.compress(bert(0), hc.StructuredPruningConfig(min_neurons=1, seq_len=8, **given), data=data)

    given = {"teacher_model": bert(1, 2)}
    return build(hc.DistillationTrainer, hc.DistillationArguments, folder, init, [drawn], given, **options)


def tokens(folder, drawn, values=None, **options):
    """Thresholds of a start and a switch that the search draws, in both stages."""
    annealing = hc.ThresholdAnnealingCallback(lambda_threshold=0.1, learning_rate=1e-2)

    def init(trial):
        given = values or (
            {"final_token_threshold": trial.suggest_float("final_token_threshold", 0.004, 0.012)} if trial else {}
        )
        return hc.compress(bert(0, 2), hc.TokenPruningConfig(masking_mode="soft", **given))

    callbacks = [drawn, annealing, hc.StageSwitchCallback(0.5)]
    return build(CompressionTrainer, hc.DistillationArguments, folder, init, callbacks, **options)


def guided(trainer_class, arguments_class, needs_teacher=True, **fixed):
    def make(folder, drawn, values=None, **options):
        given = {"teacher_model": bert(1, 2)} if needs_teacher else {}
        options = {**fixed, **options, **(values or {})}
        if not needs_teacher:
            for number in (1, 2):
                bert(number, 2).save_pretrained(folder / f"teacher-{number}")
            options["teacher_snapshots"] = [str(folder / "teacher-*")]
        return build(trainer_class, arguments_class, folder, lambda: bert(0), [drawn], given, **options)

    return make


def build(trainer_class, arguments_class, folder, init, callbacks, given=None, **options):
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "eval_strategy": "epoch", "num_train_epochs": 1, "learning_rate": 1e-2,
                "dataloader_pin_memory": False, "logging_steps": 1}  # fmt: skip
    return trainer_class(
        model=None, model_init=init, args=arguments_class(str(folder), **{**defaults, **options}),
        train_dataset=ROWS, eval_dataset=ROWS[:8], data_collator=pad, callbacks=callbacks, **(given or {}),
    )  # fmt: skip


def distillation_space(trial):
    return {
        "alpha_output": trial.suggest_float("alpha_output", 0.1, 2.0),
        "temperature": trial.suggest_float("temperature", 1.0, 4.0),
        "alpha_layer": trial.suggest_float("alpha_layer", 0.1, 1.0),
    }


def joint_space(trial):
    return {**distillation_space(trial), "teacher_learning_rate": trial.suggest_float("teacher_learning_rate", 0, 0.1)}


def proximal_space(trial):
    return {
        "proximal_weight": trial.suggest_float("proximal_weight", 0.1, 0.8),
        "teacher_learning_rate": trial.suggest_float("teacher_learning_rate", 0.001, 0.1),
    }


def nothing(trial):
    return {}


SEARCHES = {
    "weight pruning": (pruning, nothing),
    "token pruning": (tokens, nothing),
    "structured pruning": (structure, nothing),
    "fixed": (guided(hc.DistillationTrainer, hc.DistillationArguments), distillation_space),
    "joint": (guided(hc.JointTeacherTrainer, hc.JointTeacherArguments, save_teacher=False), joint_space),
    "proximal": (guided(hc.ProximalTrainer, hc.ProximalArguments, save_teacher=False), proximal_space),
    "snapshots": (
        guided(hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments, needs_teacher=False), distillation_space),
}  # fmt: skip


def search(trainer, space, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.RandomSampler(seed=0)
        return trainer.hyperparameter_search(
            space, lambda metrics: metrics["eval_loss"], n_trials=3, backend="optuna", sampler=sampler, **options
        )


def quick(*slow):
    return [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in SEARCHES]


@pytest.mark.parametrize("kind", quick("proximal"))
def test_every_trial_is_a_training_of_its_own(tmp_path, kind):
    make, space = SEARCHES[kind]
    drawn, seen = Drawn(), []

    def remembered(trial):
        values = space(trial)
        seen.append(dict(trial.params))
        return values

    best = search(make(tmp_path, drawn), remembered)
    assert len(drawn.losses) == 3
    assert len(set(drawn.losses)) == 3
    assert best.objective == min(drawn.losses)
    for values, loss in zip(seen, drawn.losses, strict=True):
        alone = Drawn()
        make(tmp_path, alone, values).train()
        assert alone.losses == pytest.approx([loss], rel=1e-5), values


@pytest.mark.parametrize("kind", quick("proximal", "structured pruning"))
def test_trials_that_fail_or_are_pruned_leave_no_trace(tmp_path, kind):
    make, space = SEARCHES[kind]
    ends = []
    for fail in (None, 2):
        drawn = Drawn()
        drawn.fail = lambda trainings, fail=fail: trainings == fail
        search(make(tmp_path, drawn), space, catch=(ValueError,))
        ends.append(drawn.losses)
    assert ends[1][1] is None
    assert ends[1][::2] == pytest.approx(ends[0][::2], rel=1e-5)

    class SecondOnly(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    drawn = Drawn()
    search(make(tmp_path, drawn, eval_strategy="steps", eval_steps=3), space, pruner=SecondOnly())
    whole = Drawn()
    search(make(tmp_path, whole, eval_strategy="steps", eval_steps=3), space)
    assert drawn.losses[::2] == pytest.approx(whole.losses[::2], rel=1e-5)


def test_every_trial_keeps_its_teacher(tmp_path):
    make = guided(hc.JointTeacherTrainer, hc.JointTeacherArguments)
    seen, trainer = [], make(tmp_path, Drawn())

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.append({name: value.clone() for name, value in trainer.teacher_model.state_dict().items()})

    trainer.add_callback(Keep())
    search(trainer, joint_space)
    for number, expected in enumerate(seen):
        opened = BertForSequenceClassification.from_pretrained(tmp_path / f"run-{number}" / "teacher").state_dict()
        assert all(torch.equal(value, opened[name]) for name, value in expected.items())
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("trainer_class", [hc.DistillationTrainer, hc.JointTeacherTrainer])
def test_trials_may_ask_a_teacher_by_name_that_the_arguments_leave_alone(tmp_path, trainer_class):
    bert(1, 2).save_pretrained(tmp_path / "dense")
    losses = []
    for teacher in (str(tmp_path / "dense"), bert(1, 2)):
        drawn, given, kind = Drawn(), {"teacher_model": teacher}, trainer_class.arguments_class
        trainer = build(trainer_class, kind, tmp_path / "run", lambda: bert(0), [drawn], given, alpha_output=0.0)
        search(trainer, distillation_space)
        losses.append(drawn.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize(("name", "value", "text"), [
    ("alpha_output", -1.0, "alpha_output must be zero or positive, got -1.0"),
    ("temperature", 0.0, "temperature must be positive, got 0.0"),
    ("gradient_accumulation_steps", 0, "gradient_accumulation_steps is 0"),
])  # fmt: skip
def test_values_that_a_trial_may_not_draw(tmp_path, name, value, text):
    make, _ = SEARCHES["fixed"]
    with pytest.raises(ValueError, match=text):
        search(make(tmp_path, Drawn()), lambda trial: {name: value})
