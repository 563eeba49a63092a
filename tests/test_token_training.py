"""Training that prunes tokens: stages and their marks, temperature, lambda, clipping, accumulation, compilation."""

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainerState, TrainingArguments

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.forward_state import FORWARD_STATE
from hf_compress.methods.token_pruning import attention
from hf_compress.methods.token_pruning import callbacks as callbacks_module
from hf_compress.methods.token_pruning.importance import keep_above, keep_rate_ramp, kept_counts
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.methods.token_pruning.packing import Packing
from hf_compress.methods.token_pruning.training import training_of


HEAD = "sequence_classification"


@pytest.fixture
def rows(sentences, tokenizer):
    return [{**tokenizer(text), "labels": label} for text, label in sentences[:16]]


@pytest.fixture
def student(model):
    """`student(**fields)`: a tiny classifier that drops tokens, in its soft stage."""

    def make(**fields):
        fields = {"masking_mode": "soft", "final_token_threshold": 0.02, **fields}
        return hc.compress(model("bert", HEAD), hc.TokenPruningConfig(**fields))

    return make


@pytest.fixture
def train(rows, tokenizer, tmp_path):
    """`train(network, *callbacks, kind, data, resume, **settings)`: two updates; returns the trainer."""

    def run(network, *callbacks, kind=hc.CompressionTrainer, data=None, resume=None, **settings):
        defaults = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3}
        args = TrainingArguments(
            str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True, **{**defaults, **settings}
        )
        trainer = kind(
            network, args, train_dataset=rows if data is None else data, eval_dataset=rows, processing_class=tokenizer,
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


class Watch(TrainerCallback):
    """Notes `look(model)` when an update has its gradients, clipped."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(self.look(model))


@pytest.mark.parametrize("kind", [hc.CompressionTrainer, Trainer])
@pytest.mark.parametrize("first", ["annealing", "switch"])
def test_the_temperature_ends_with_the_soft_stage(student, train, kind, first):
    watch = Watch(lambda model: thresholds_of(model).temperature)
    pair = [hc.ThresholdAnnealingCallback(1e-2, 1e-4), hc.StageSwitchCallback(0.5)]
    network = student()
    train(network, *(pair if first == "annealing" else pair[::-1]), watch, kind=kind, max_steps=4)
    assert watch.seen == pytest.approx([1e-2, 1e-3, 1e-4, 1e-4])
    # What is trained next with the same model has no switch.
    again = Watch(lambda model: thresholds_of(model).temperature)
    train(network, hc.ThresholdAnnealingCallback(1e-2, 1e-4), again, kind=kind, max_steps=2)
    assert again.seen == pytest.approx([1e-2, 1e-3])


@pytest.mark.parametrize(("step", "kept"), [(2, True), (3, False), (4, True), (5, True)])
def test_the_best_model_is_forgotten_at_the_switch_alone(student, step, kept):
    """Whether this run came there or another one did: a resumed run begins with a soft model."""
    state = TrainerState(global_step=step, max_steps=6, best_metric=0.9, best_global_step=2, best_model_checkpoint="c")
    network = student()
    hc.StageSwitchCallback(0.5).on_step_begin(None, state, None, model=network)
    assert network.config.masking_mode == ("soft" if step < 3 else "hard")
    found = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
    assert found == ((0.9, 2, "c") if kept else (None, None, None))


def test_trainers_of_one_model_keep_their_settings_apart(student, rows, tokenizer, tmp_path):
    """What one trainer's callbacks say of the thresholds does not reach another trainer, nor is it lost to it."""
    network = student(masking_mode="hard")
    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=4, save_strategy="no",
        learning_rate=1e-3,
    )  # fmt: skip
    shared = {"model": network, "args": args, "train_dataset": rows, "processing_class": tokenizer}
    callbacks = [hc.ThresholdAnnealingCallback(learning_rate=1e-2), hc.StageSwitchCallback(0.5)]
    switching = hc.CompressionTrainer(**shared, callbacks=callbacks)
    hard = hc.CompressionTrainer(**shared)
    hard.train()
    assert network.config.token_prune_stage == "hard"
    assert not thresholds_of(network).values.requires_grad
    assert all(group["initial_lr"] == 1e-3 for group in hard.optimizer.param_groups)
    before = thresholds_of(network).values.detach().clone()
    switching.train()
    assert switching.optimizer.param_groups[-1]["initial_lr"] == 1e-2
    assert not torch.equal(thresholds_of(network).values, before)
    assert (network.config.masking_mode, network.config.token_prune_stage) == ("hard", "hard")


@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_a_checkpoint_of_a_switching_run_needs_the_switch(student, train, tmp_path, stage):
    saved = student(masking_mode=stage, token_prune_stage="switching")
    saved.save_pretrained(tmp_path / "checkpoint")
    for mode in ("soft", "hard"):
        with pytest.raises(ValueError, match=f"of the {mode} phase, got one of a training that switches.*Switch"):
            train(student(masking_mode=mode), resume=str(tmp_path / "checkpoint"))
    switching = student()
    hc.StageSwitchCallback(0.5).on_new_model(switching)
    training = training_of(switching, "this test")
    training.begin()
    training.check_resume(saved.config)
    # Opened and trained anew, it is a model like any other.
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint")
    train(opened, max_steps=1)
    assert opened.config.token_prune_stage == opened.config.masking_mode == stage
    assert thresholds_of(opened).values.requires_grad == (stage == "soft")


def test_a_soft_phase_without_a_regulariser_warns(student, train, caplog):
    train(student(), max_steps=1)
    assert caplog.text.count("lambda is 0: nothing pushes tokens out") == 1
    caplog.clear()
    train(student(), hc.ThresholdAnnealingCallback(lambda_threshold=0.0), max_steps=1)
    for steered in (student(masking_mode="hard"), student()):
        thresholds_of(steered).weight.fill_(float(steered.config.masking_mode == "soft"))
        (warning,) = training_of(steered, "this test").callbacks([])
        warning.on_train_begin(None, None, None, model=steered)
    assert "lambda is 0" not in caplog.text


def test_a_target_needs_a_training_set_with_a_length(student, train, rows):
    stream = Dataset.from_list(rows).to_iterable_dataset()
    for kind in (hc.CompressionTrainer, Trainer):
        with pytest.raises(ValueError, match="target_relative_macs needs a training set with a length"):
            train(student(), hc.ThresholdAnnealingCallback(target_relative_macs=0.6), kind=kind, data=stream)


def test_thresholds_have_their_learning_rate_beside_a_plateau(student, train):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(student(), hc.ThresholdAnnealingCallback(learning_rate=3e-3), **settings)
    assert trainer.optimizer.param_groups[-1]["lr"] == 3e-3
    with pytest.raises(ValueError, match="learning_rate must be given to the constructor"):
        train(student(), hc.ThresholdAnnealingCallback(learning_rate=3e-3), kind=Trainer, **settings)


def test_what_is_left_is_measured_once_an_update(student, train):
    network, measured = student(final_token_threshold=0.0), []
    network.base_model.register_forward_hook(lambda module, *_: measured.append(None) if not module.training else None)
    train(network, hc.ThresholdAnnealingCallback(target_relative_macs=1.0, measure_every=1), max_steps=3)
    assert len(measured) == 3 + 1  # and at the end


def test_lambda_is_what_the_controller_makes_of_distances(student, monkeypatch):
    left = iter([0.7, 0.6, 0.45])
    monkeypatch.setattr(callbacks_module, "relative_macs", lambda *_: next(left))
    monkeypatch.setattr(callbacks_module, "scale_thresholds", lambda *_, measured: 1.0)
    network = student()
    steer = hc.ThresholdAnnealingCallback(
        lambda_threshold=0.1, target_relative_macs=0.5, gain=2.0, integral_gain=0.05, measure_every=2
    )
    found = []
    for step in range(6):
        steer.on_step_begin(None, TrainerState(global_step=step, max_steps=6), None, model=network)
        found.append(float(thresholds_of(network).weight))
    first, second = 0.1 + 2 * 0.2 + 0.05 * 0.2, 0.1 + 2 * 0.1 + 0.05 * (0.2 + 0.1)
    third = 0.1 - 2 * 0.05 + 0.05 * (0.2 + 0.1 - 0.05)
    assert found == pytest.approx([first, first, second, second, third, third])


def test_thresholds_are_clipped_apart_from_weights(student, train):
    def norms(network):
        theta = thresholds_of(network).values
        others = [p.grad for p in network.parameters() if p is not theta and p.grad is not None]
        return [float(theta.grad.norm()), float(torch.nn.utils.get_total_norm(others))]

    watch = Watch(norms)
    train(student(), hc.ThresholdAnnealingCallback(1e-3, 1e-3), watch, max_grad_norm=1e-3)
    assert len(watch.seen) == 2
    for found in watch.seen:
        assert found == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_accumulated_batches_equal_one_batch(student, train):
    """Specification 12, T16: the same loss and the same gradient of thresholds."""
    found = []
    for size, parts in ((16, 1), (4, 4)):
        watch = Watch(lambda model: thresholds_of(model).values.grad.clone())
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_grad_norm": 0}
        trainer = train(student(), hc.ThresholdAnnealingCallback(), watch, max_steps=1, **settings)
        found.append((trainer.state.log_history[0]["loss"], watch.seen[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1][1:] != 0).all()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def kept_tokens(network, batch):
    state = LiveTokens(whole=True)
    with torch.no_grad():
        network.eval()(**batch, forward_state=state)
    return state


def test_more_lambda_keeps_fewer_tokens(student, train, batches):
    """Specification 12, T11."""
    batch, left = None, []
    for weight in (0.0, 0.02, 0.1, 1.0):
        network = student(final_token_threshold=0.006)
        batch = batch or batches(network.config, count=1)[0]
        steer = hc.ThresholdAnnealingCallback(2e-3, 2e-3, lambda_threshold=weight, learning_rate=2e-3)
        train(network, steer, max_steps=4)
        left.append(int(sum(fed.sum() for fed in kept_tokens(network, batch).fed.values())))
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]


def test_a_higher_threshold_adds_no_token(student, batches):
    """Specification 12, T12: for a layer whose inputs stay as they are."""
    network = student()
    batch, before, counts = batches(network.config, count=1)[0], None, []
    for theta in (0.0, 0.004, 0.008, 0.016, 0.1):
        thresholds_of(network).values.data[1] = theta
        kept = kept_tokens(network, batch).kept_after(1)
        assert before is None or (kept <= before).all()
        before = kept
        counts.append(int(kept.sum()))
    assert counts[0] == int(batch["attention_mask"].sum())
    assert counts[-1] == len(kept)
    lengths = torch.arange(1, 65)
    rates = [keep_rate_ramp(rate, 12) for rate in (0.9, 0.5, 0.2, -0.4)]
    for more, fewer in zip(rates, rates[1:], strict=False):
        for high, low in zip(more, fewer, strict=True):
            assert (kept_counts(lengths, low) <= kept_counts(lengths, high)).all()


def test_a_threshold_of_zero_keeps_all():
    scores = torch.tensor([[0.1, 0.0, 1e-7]])
    live = torch.tensor([[True, True, False]])
    assert keep_above(scores, None, 0.0).tolist() == [[True, True, True]]
    assert keep_above(scores, live, torch.tensor(0.0)).tolist() == [[True, True, False]]
    assert keep_above(scores, None, 1e-9).tolist() == [[True, False, False]]


def test_counted_arithmetic_is_what_a_profiler_sees(model, batches):
    """Specification 12, T18: linear layers, where the output projection of dropped tokens is saved on top."""
    network = hc.compress(model("bert", "token_classification"), hc.TokenPruningConfig(final_token_threshold=0.014))
    batch, state = batches(network.config, count=1)[0], LiveTokens(whole=True)
    with torch.no_grad(), FlopCounterMode(display=False) as profiler:
        network.base_model(**batch, forward_state=state)
    seen = profiler.get_flop_counts()["Global"][torch.ops.aten.addmm] // 2
    blocks, width = layers_of(network), 32
    attended, fed = (sum(int(of[i].sum()) for i in range(3)) for of in (state.attended, state.fed))
    quadratic = sum(2 * width * int((state.attended[i] ** 2).sum()) for i in range(3))
    assert fed < attended
    assert seen == int(state.macs(blocks)[0].sum()) - quadratic - width**2 * (attended - fed)


def test_arithmetic_is_exact_without_double_precision(student, monkeypatch):
    """Some accelerators have none, and single precision cannot tell these numbers apart."""

    def refuse(*args, **kwargs):
        raise TypeError("no float64 here")

    blocks, long, short = layers_of(student()), 2**20 + 1, 2**20 - 1
    attended = {i: torch.tensor([long, 3]) for i in range(3)}
    state = LiveTokens(attended=attended, fed={i: torch.tensor([short, 1]) for i in range(3)})
    monkeypatch.setattr(torch.Tensor, "double", refuse)
    macs, dense = state.macs(blocks)
    each = 4 * 32**2 * (long + 3) + 2 * 32 * (long**2 + 9)
    assert macs.tolist() == [each + 2 * 32 * 64 * (short + 1)] * 3
    assert dense.tolist() == [each + 2 * 32 * 64 * (long + 3)] * 3


@pytest.mark.slow
# Dynamo looks at every tensor's `grad`, for which torch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_computes_the_same(model, batches):
    network = hc.compress(model("roberta", HEAD), hc.TokenPruningConfig(final_token_threshold=0.03))
    batch = batches(network.config, count=1, size=3)[0]
    with torch.no_grad():
        expected = network(**batch).logits
        found = torch.compile(network, backend="eager")(**batch).logits
    assert (kept_tokens(network, batch).fed[1] < batch["attention_mask"].sum(1)).any()
    torch.testing.assert_close(found, expected)


def test_several_gpus_in_one_process_are_refused(student, train, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu must be 1, got 2 .*torchrun"):
        hc.CompressionTrainer(student(), args)


@pytest.mark.parametrize("alone", [False, True], ids=["together", "example by example"])
@pytest.mark.parametrize("scored", [False, True])
def test_every_way_to_attend_is_the_same(student, alone, scored, monkeypatch):
    """Packed rows of examples of 1 to 9 tokens against softmax written out, for each layout of the work."""
    layer = student().eval().bert.encoder.layer[1]
    lengths = [9, 1, 4, 9, 2]
    monkeypatch.setattr(attention, "_WEIGHTS_ALONE", 0 if alone else 2**30)
    # Two examples a piece, with one left over.
    monkeypatch.setattr(attention, "_WEIGHTS_AT_A_TIME", 2 * layer.token_rule.config.num_attention_heads * 81 * 4)
    packing = Packing.of(torch.arange(9) < torch.tensor(lengths)[:, None])
    rows = torch.randn(sum(lengths), layer.token_rule.config.hidden_size)
    with torch.no_grad():
        context, received = attention.attend(layer, layer.token_rule, packing, rows, scored)
        start = 0
        for example, length in enumerate(lengths):
            own = rows[start : start + length]
            size, heads = layer.token_rule.head_size, layer.token_rule.config.num_attention_heads
            q, k, v = (
                getattr(layer.attention.self, name)(own).view(length, heads, size)
                for name in ("query", "key", "value")
            )
            shares = torch.einsum("ihd,jhd->hij", q, k).div(size**0.5).softmax(-1)
            expected = torch.einsum("hij,jhd->ihd", shares, v).flatten(1)
            assert torch.allclose(context[start : start + length], expected, atol=1e-6)
            if scored:
                assert torch.allclose(received[example, :length], shares.mean(0).sum(0), atol=1e-6)
                assert not received[example, length:].any()
            start += length
    assert (received is None) == (not scored)


def test_an_example_without_tokens_does_not_hear_its_neighbours(student):
    """Its logits are those of it alone, whatever stands beside it and whichever rows are computed."""
    network = student(masking_mode="hard").eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = torch.randint(5, 100, (3, 6))
    with torch.no_grad():
        alone = network(input_ids=ids[1:2], attention_mask=mask[1:2]).logits[0]
        for mates in (ids, ids.flip(0)):
            mates = torch.stack([mates[0], ids[1], mates[2]])
            logits = network(input_ids=mates, attention_mask=mask).logits
            assert torch.allclose(logits[1], alone, atol=1e-6)
            whole = network(input_ids=mates, attention_mask=mask, **{FORWARD_STATE: LiveTokens(whole=True)}).logits
            assert torch.allclose(logits, whole, atol=1e-6)
