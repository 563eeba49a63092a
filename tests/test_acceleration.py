"""Sparse kernels are used where they fit and where they are faster, and nowhere else; all decisions without a GPU."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.timing import time_in_turns
from hf_compress.methods.weight_pruning import acceleration, kernels
from hf_compress.methods.weight_pruning.kernels import Format, PackedLinear, two_of_four_obstacle
from tests.contract.conftest import logits_of
from tests.rounding import assert_equal_to_rounding


mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="CSR needs MKL")


@pytest.fixture
def sparse(model):
    """A tiny BERT, nine tenths zero in blocks of 4x1."""
    return hc.compress(model("bert"), hc.WeightPruningConfig(criterion="magnitude", scope="local"))


@pytest.fixture
def clock(monkeypatch):
    """`clock(dense=2.0, packed=1.0)`: every run takes this long; nothing is really timed, but all of it runs."""

    def make(**seconds):
        def timed(runs, devices, repeats, warmup, before=None):
            for name, (run,) in runs.items():
                if before is not None:
                    before(name)
                run()
            return {name: [seconds[name]] for name in runs}

        monkeypatch.setattr(acceleration, "time_in_turns", timed)

    return make


def packed_names(model):
    return [name for name, module in model.named_modules() if type(module) is PackedLinear]


@mkl
@pytest.mark.parametrize("shape", [(7, 16), (2, 7, 16), (2, 3, 7, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_csr_equals_dense(shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=bias))
    model[0].weight.data *= torch.rand(24, 16) > 0.95
    assert hc.accelerate_for_inference(model).packed == ["0"]
    for inputs in (torch.randn(shape), torch.randn(*shape[:-2], 16, shape[-2]).mT):
        with torch.inference_mode():
            found = model(inputs)
        assert found.shape == (*shape[:-1], 24)
        assert torch.allclose(found, F.linear(inputs, model[0].weight, model[0].bias), atol=1e-6)


@mkl
def test_outputs_saving_and_copies(sparse, batches, tmp_path, caplog):
    (batch,) = batches(sparse.config, count=1, size=4)
    before, dense = copy.deepcopy(sparse.state_dict()), logits_of(sparse, batch)[0]
    with caplog.at_level(logging.INFO):
        result = hc.accelerate_for_inference(sparse.train())
    assert not sparse.training
    assert (result.format, len(result.packed), result.speedup) == ("csr", 18, None)
    assert result.dense == {"pooler.dense": "at least 0.85 of the weight must be zero on the CPU, got 0.00"}
    assert packed_names(sparse) == result.packed
    assert "18 of 19 linear layers use csr; not measured." in caplog.text
    assert torch.allclose(logits_of(sparse, batch)[0], dense, atol=1e-5)
    # The weights are where they were: what is saved is the ordinary model, and opens as one.
    assert sparse.state_dict().keys() == before.keys()
    sparse.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert packed_names(reloaded) == []
    assert_equal_to_rounding(logits_of(reloaded, batch)[0], dense)
    # A copy has weights of its own.
    assert_equal_to_rounding(logits_of(copy.deepcopy(sparse), batch)[0], dense)


@mkl
def test_dense_where_packed_would_be_wrong(sparse, batches, monkeypatch):
    """Training, gradients, changed weights, another dtype, autocast, more tokens than were tried."""
    hc.accelerate_for_inference(sparse)
    layer = blocks_of_packed(sparse)[0]
    calls = []
    form = layer.pack.form
    counted = Format("csr", form.obstacle, form.pack, lambda *args: calls.append(1) or form.linear(*args), 128)
    layer.pack.form = counted
    inputs = torch.randn(2, 5, 32)
    expected = F.linear(inputs, layer.weight, layer.bias)
    with torch.no_grad():
        layer(inputs)
    assert len(calls) == 1
    assert layer(inputs).requires_grad  # With gradients.
    with torch.no_grad():
        layer.train()(inputs)
        layer.eval()
        layer(torch.randn(1, 129, 32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(inputs)
        assert len(calls) == 1
        layer.weight.mul_(2)
        assert torch.allclose(layer(inputs) - layer.bias, 2 * (expected - layer.bias), atol=1e-5)
        layer.double()(inputs.double())
    assert len(calls) == 1
    # Accelerated again, it is used again.
    hc.accelerate_for_inference(sparse.float())
    with torch.inference_mode():
        assert torch.allclose(layer(inputs) - layer.bias, 2 * (expected - layer.bias), atol=1e-5)


def blocks_of_packed(model):
    return [module for module in model.modules() if type(module) is PackedLinear]


@mkl
def test_kept_where_it_measures_faster(sparse, batches, clock):
    clock(dense=3.0, packed=2.0)
    (batch,) = batches(sparse.config, count=1)
    result = hc.accelerate_for_inference(sparse, {**batch, "labels": torch.zeros(8)})
    assert (len(result.packed), result.speedup, result.dense_seconds) == (18, 1.5, 3.0)
    # As many tokens as the batch had.
    assert {layer.pack.max_rows for layer in blocks_of_packed(sparse)} == {8 * 24}


@mkl
def test_kept_dense_where_it_measures_slower(sparse, batches, clock, caplog):
    clock(dense=1.0, packed=1.0)
    (batch,) = batches(sparse.config, count=1)
    dense = logits_of(sparse, batch)[0]
    result = hc.accelerate_for_inference(sparse, batch)
    assert (result.packed, packed_names(sparse), result.speedup) == ([], [], None)
    reason = "measured 1.00 times as fast as dense on inputs of shape (8, 24, 32)"
    assert result.dense["encoder.layer.0.attention.self.query"] == reason
    assert "All 19 linear layers stay dense: sparse kernels are not faster here" in caplog.text
    assert f"(encoder.layer.0.attention.self.query: {reason})." in caplog.text
    assert_equal_to_rounding(logits_of(sparse, batch)[0], dense)
    assert all(type(layer.ffn_out.module) is nn.Linear for layer in layers_of(sparse))


@mkl
def test_layers_may_win_where_the_model_does_not(sparse, batches, clock, monkeypatch):
    clock(dense=1.0, packed=2.0)
    monkeypatch.setattr(acceleration, "_measured_linear", lambda *_: 2.0)
    (batch,) = batches(sparse.config, count=1)
    result = hc.accelerate_for_inference(sparse, batch)
    assert (result.packed, packed_names(sparse), result.speedup) == ([], [], 0.5)
    assert set(result.dense.values()) >= {"the whole model measured 0.50 times as fast as dense"}


@mkl
def test_real_clock_on_a_layer_that_wins(batches):
    """Far from any doubt: 98 % zeros, few tokens, wide layers."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4096
    )
    wide = BertModel(config, add_pooling_layer=False)
    hc.compress(wide, hc.WeightPruningConfig(criterion="magnitude", target_sparsity=0.98))
    (batch,) = batches(config, count=1, size=1)
    dense = logits_of(wide, batch)[0]
    result = hc.accelerate_for_inference(wide, batch, repeats=11)
    assert "encoder.layer.0.intermediate.dense" in result.packed
    assert result.speedup > 1.05
    assert torch.allclose(logits_of(wide, batch)[0], dense, atol=1e-5)


def test_turns_are_fair():
    order = []
    runs = {"a": [lambda: order.append("a")], "b": [lambda: order.append("b")]}
    taken = time_in_turns(runs, dict.fromkeys("ab", torch.device("cpu")), 2, 2)
    assert "".join(order) == "abbaabba"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_refusals_on_the_cpu(model, monkeypatch):
    dense = model("bert")
    with pytest.raises(ValueError, match=r"No layer can be accelerated on the CPU; of the sparsest one, .* got 0.00"):
        hc.accelerate_for_inference(dense)
    assert packed_names(dense) == []
    two_of_four = hc.compress(
        model("bert"), hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude")
    )
    with pytest.raises(ValueError, match=r"at least 0.85 of the weight must be zero on the CPU, got 0.50"):
        hc.accelerate_for_inference(two_of_four)
    empty = nn.Linear(32, 32)
    empty.weight.data.zero_()
    with pytest.raises(ValueError, match="dtype must be float32 on the CPU, got bfloat16"):
        hc.accelerate_for_inference(copy.deepcopy(empty).bfloat16())
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this build of torch has no MKL"):
        hc.accelerate_for_inference(empty)
    with pytest.raises(ValueError, match="must have plain torch.nn.Linear layers, got LayerNorm without any"):
        hc.accelerate_for_inference(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="must be on the CPU or on an NVIDIA GPU to be accelerated, got meta"):
        hc.accelerate_for_inference(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        hc.accelerate_for_inference(empty, repeats=0)


def two_of_four_weight(rows=64, columns=128, dtype=torch.bfloat16):
    return (torch.ones(rows, columns) * torch.tensor([0, 1, 0, 1]).repeat(columns // 4)).to(dtype)


def test_what_sparse_tensor_cores_take():
    weight = two_of_four_weight()
    assert two_of_four_obstacle(weight, (8, 0)) is None
    assert two_of_four_obstacle(weight.half(), (9, 0)) is None
    assert two_of_four_obstacle(torch.zeros_like(weight), (8, 0)) is None
    assert two_of_four_obstacle(weight, (7, 5)) == "the GPU must have compute capability 8.0 or more, got 7.5"
    assert two_of_four_obstacle(weight.float(), (8, 0)) == "dtype must be float16 or bfloat16 on CUDA, got float32"
    assert two_of_four_obstacle(weight[:48], (8, 0)) == "shape must be a multiple of 32 x 64, got 48 x 128"
    assert two_of_four_obstacle(weight[:, :96], (8, 0)) == "shape must be a multiple of 32 x 64, got 64 x 96"
    weight[3, 4:8] = 1
    weight[5, 0] = 1
    expected = "the weight must be 2:4, got 2 of 2048 groups of four with more than two non-zeros"
    assert two_of_four_obstacle(weight, (8, 0)) == expected


@pytest.fixture
def gpu(monkeypatch):
    """The CUDA path with a stand-in for its packing and its kernel."""

    def make(pack=lambda weight: weight.detach().clone()):
        form = Format("2:4", lambda w: two_of_four_obstacle(w, (8, 0)), pack, kernels._two_of_four_linear, None)
        monkeypatch.setattr(acceleration, "format_for", lambda device: form)

    return make


def test_two_of_four_decisions_without_a_gpu(gpu, clock):
    gpu()
    clock(dense=2.0, packed=1.0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 10)).bfloat16()
    model[0].weight.data = two_of_four_weight()
    result = hc.accelerate_for_inference(model, {"input": torch.randn(3, 128).bfloat16()})
    assert (result.packed, result.speedup) == (["0"], 2.0)
    assert result.dense == {"1": "shape must be a multiple of 32 x 64, got 10 x 64"}
    # On a GPU large inputs are what sparse kernels are for.
    assert model[0].pack.max_rows == float("inf")
    with torch.no_grad():
        assert model(torch.randn(1000, 128).bfloat16()).shape == (1000, 10)


def test_what_torch_refuses_is_named(gpu):
    def refuse(weight):
        raise RuntimeError("cuSPARSELt not supported on your machine\nmore")

    gpu(refuse)
    model = nn.Sequential(nn.Linear(128, 64)).bfloat16()
    model[0].weight.data = two_of_four_weight()
    with pytest.raises(ValueError, match="'0', torch refuses it: cuSPARSELt not supported on your machine.$"):
        hc.accelerate_for_inference(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.gpu
def test_two_of_four_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024)).cuda().half()
    model[0].weight.data *= two_of_four_weight(1024, 1024, torch.float16).cuda()
    inputs = torch.randn(4, 100, 1024, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        dense = model(inputs)
        assert hc.accelerate_for_inference(model).packed == ["0"]
        assert torch.allclose(model(inputs), dense, atol=1e-2, rtol=1e-2)
