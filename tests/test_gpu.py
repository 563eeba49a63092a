"""What runs on a GPU gives what it gives on the CPU; the same tests run on the CPU, too, in half precision."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import hf_compress as hc
from hf_compress.core.batches import on_device
from hf_compress.report.memory import CUDA_MEMORY, TENSOR_MEMORY, resident_bytes
from tests.contract.conftest import METHOD_CONFIGS
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, linear, same, trainer_of, weights
from tests.half_precision import places, training_on
from tests.pruned_training import HEAD, SMALL, ZerosStay, examples, linears, pruning_trainer, zero_units
from tests.rounding import assert_compressed_alike
from tests.test_acceleration import two_of_four_weight


place = places(pytest.mark.slow)

# How far a training may end from the one in single precision on the CPU, as a share of its way; three to five times
# what the CPU itself gives in that precision.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 2e-1}
KINDS = ["plain", "fixed", "joint", "proximal", "snapshots"]
# Gradients as they are: Adam makes the signs of tiny ones into whole steps.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "alpha_task": 1.0, "alpha_output": 1.0, "alpha_layer": 0.1}


def fitted(kind, folder, saved_states, **options):
    """The trainer of six updates from the same weights, with accumulation, after its training."""
    if kind == "plain":
        given = {name: value for name, value in options.items() if not name.startswith("alpha")}
        args = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=8, gradient_accumulation_steps=2, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_steps=1, seed=3, dataloader_pin_memory=False, **given,
        )  # fmt: skip
        trainer = hc.CompressionTrainer(linear(0), args, train_dataset=ROWS, data_collator=pad)
    elif kind == "snapshots":
        trainer = trainer_of(kind, folder, linear(0), teacher_snapshots=saved_states, **options)
    else:
        more = {"teacher_learning_rate": 0.02} if kind != "fixed" else {}
        if kind == "proximal":
            more |= {"alpha_task": 0.0, "zero_init_heads": False}
        trainer = trainer_of(kind, folder, linear(0), dense(1), **{**options, **more})
    trainer.train()
    return trainer


def flat(model):
    """All weights that a gradient moves far, as one vector: the true gradient of a key bias is zero."""
    found = [p.detach().cpu().double().flatten() for n, p in model.named_parameters() if "key.bias" not in n]
    return torch.cat(found)


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("kind", KINDS)
def test_trainings_end_where_the_cpu_ends(tmp_path, place, kind, precision, saved_states):
    reference = fitted(kind, tmp_path / "reference", saved_states, **PLAIN, **training_on("cpu"))
    trainer = fitted(kind, tmp_path / "there", saved_states, **PLAIN, **training_on(place, precision))
    assert trainer.model.device.type == place
    pairs = [(trainer.model, reference.model, linear(0))]
    if kind in ("joint", "proximal"):
        assert trainer.teacher_model.device.type == place
        pairs.append((trainer.teacher_model, reference.teacher_model, dense(1)))
    for found, expected, before in pairs:
        way = (flat(expected) - flat(before)).norm()
        assert float((flat(found) - flat(expected)).norm() / way) < TOLERANCE[precision]
    ours, theirs = (t.state.log_history[-2]["loss"] for t in (trainer, reference))
    assert ours == pytest.approx(theirs, rel=TOLERANCE[precision])


def test_a_cache_of_the_teacher_gives_what_the_teacher_gave(tmp_path, place):
    def run(name, **options):
        options = {**PLAIN, "alpha_layer": 1.0, **training_on(place), **options}
        trainer = trainer_of("fixed", tmp_path / name, linear(0), dense(1), **options)
        trainer.train()
        return trainer

    cache = {"teacher_cache_dir": str(tmp_path / "cache")}
    without, cold, warm = run("without"), run("cold", **cache), run("warm", **cache)
    assert (cold.teacher_cache.misses > 0, warm.teacher_cache.misses) == (True, 0)
    assert same(weights(cold.model), weights(warm.model))
    torch.testing.assert_close(flat(cold.model), flat(without.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", list(METHOD_CONFIGS))
def test_methods_change_a_model_as_on_the_cpu(place, method, model, batches):
    """Calibration, surgery and the forward pass of what came out, in single precision."""
    start = model("bert", HEAD)
    data = batches(start.config)
    there, here = copy.deepcopy(start).to(place), start
    for network in (there, here):
        hc.compress(network, METHOD_CONFIGS[method](), data=data)
        network.eval()
    assert {p.device.type for p in there.parameters()} == {place}
    with torch.no_grad():
        seen = batches(here.config, count=1)[0]
        found, expected = (m(**on_device(m, seen)).logits.cpu() for m in (there, here))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert_compressed_alike(there.cpu(), here)


@pytest.mark.parametrize("fields", [{"final_token_threshold": 0.02}, {"prune_mode": "topk", "token_keep_rate": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropped_tokens_are_those_of_the_cpu(place, fields, dtype, model, batches):
    network = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(**fields)).eval()
    data = batches(network.config, count=2)
    expected_macs = hc.count_cost(network, data=data).macs
    with torch.no_grad():
        expected = network(**data[0]).logits
        moved = copy.deepcopy(network).to(place, dtype)
        found = moved(**on_device(moved, data[0])).logits
    assert found.dtype == dtype
    exact = dtype == torch.float32
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=1e-4 if exact else 0.3)
    assert hc.count_cost(moved, data=data).macs == pytest.approx(expected_macs, rel=1e-9 if exact else 0.1)


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_training_that_drops_tokens(tmp_path, place, precision):
    """Three updates of the soft phase, in which thresholds learn, and three of the hard one."""

    def run(name, *where):
        student = hc.compress(dense(0), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.05))
        start = student.bert.token_thresholds.values.detach().clone()
        trainer = trainer_of("fixed", tmp_path / name, student, dense(1), **PLAIN, **training_on(*where))
        for callback in (hc.ThresholdAnnealingCallback(), hc.StageSwitchCallback()):
            trainer.add_callback(callback)
        trainer.train()
        assert student.config.masking_mode == "hard"
        assert all(torch.isfinite(p).all() for p in student.parameters())
        return start, student.bert.token_thresholds.values.detach().cpu()

    (start, found), (_, expected) = run("there", place, precision), run("reference", "cpu")
    assert not torch.equal(found, start)
    way = (expected - start).norm()
    # A token near a threshold may fall on either side of it in half precision.
    assert float((found - expected).norm() / way) < (TOLERANCE["fp32"] if precision == "fp32" else 0.5)


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("config", [SMALL, {**SMALL, "pattern": "2:4", "target_sparsity": 0.5}])
def test_pruned_weights_stay_zero(tmp_path, place, precision, config, model, batches):
    start = model("bert", HEAD)
    options = training_on(place, precision)
    trainer, watch = pruning_trainer(start, tmp_path, examples(start.config, batches), config, **options)
    assert isinstance(watch, ZerosStay)
    trainer.train()
    assert len(watch.seen) == 14
    counts = [zero_units(config["pattern"], weight.cpu()) for weight in linears(trainer.model).values()]
    zero, units = (sum(column) for column in zip(*counts, strict=True))
    ceiling = 1.0 if config["pattern"] == "2:4" else config["target_sparsity"]
    assert zero / units == pytest.approx(ceiling, abs=0.01)


def test_latency_and_memory(place, model, batches):
    networks = {name: model("bert", HEAD).to(place) for name in ("one", "other")}
    found = hc.measure_latency(networks, batches(networks["one"].config, count=2), repeats=3)
    assert [timed.name for timed in found] == ["one", "other"]
    for timed in found:
        assert torch.device(timed.device).type == place
        assert timed.memory_kind == (CUDA_MEMORY if place == "cuda" else TENSOR_MEMORY)
        assert timed.peak_memory > resident_bytes(networks["one"])
        assert 0 < timed.p50 <= timed.p95


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 768), (3072, 768), (768, 3072), (32, 64)])
def test_two_of_four_products(dtype, outputs, inputs):
    """Against a product of the same numbers in double precision; any number of tokens, any leading axes."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, outputs)).cuda().to(dtype)
    layer[0].weight.data *= two_of_four_weight(outputs, inputs, dtype).cuda()
    assert hc.accelerate_for_inference(layer).packed == ["0"]
    for shape in ((1,), (7,), (8, 128), (3, 5, 9)):
        states = torch.randn(*shape, inputs, device="cuda", dtype=dtype)
        with torch.inference_mode():
            found = layer(states)
            exact = nn.functional.linear(states.double(), layer[0].weight.double(), layer[0].bias.double())
        assert found.shape == (*shape, outputs)
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_on_two_of_four_kernels(dtype, model, batches):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    network = dense(0, **sizes).cuda().to(dtype).eval()
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude", scope="local")
    hc.compress(network, config)
    data = [on_device(network, batch) for batch in batches(network.config, count=2)]
    with torch.inference_mode():
        expected = network(**data[0]).logits
    result = hc.accelerate_for_inference(network)
    assert (result.format, len(result.packed)) == ("2:4", 12)
    with torch.inference_mode():
        found = network(**data[0]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    # Measured, it keeps what is faster and stays right.
    hc.accelerate_for_inference(network, data[0], repeats=3)
    with torch.inference_mode():
        torch.testing.assert_close(network(**data[0]).logits, expected, rtol=0, atol=0.05)
