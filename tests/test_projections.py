"""Projections as every method sees them, and layers that lose heads and neurons: the same as masking them."""

import copy

import torch
from torch import nn
from transformers import DebertaV2Model, MistralConfig, MistralModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import layers_of
from hf_compress.core.cost import count_cost
from hf_compress.core.projections import HEAD_ROLES, NEURON_ROLES, Projection, Role
from hf_compress.core.surgery import keep_heads_, keep_inputs_, keep_neurons_, keep_outputs_, resize_
from tests.conftest import ARCHITECTURES
from tests.images_and_sounds import cast, real_tokens
from tests.rounding import assert_equal_to_rounding


def hidden(model, batch):
    with torch.no_grad():
        return model(**cast(batch, model))[0]


def multiply_input_(module, mask):
    """From now on the module reads its input times a mask."""
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask, *inputs[1:]))


def test_a_transposed_module_looks_like_a_linear_one():
    torch.manual_seed(0)
    stored = Conv1D(6, 4)
    plain = nn.Linear(4, 6)
    plain.weight.data.copy_(stored.weight.data.T)
    plain.bias.data.copy_(stored.bias.data)
    rows, columns = torch.tensor([4, 1]), torch.tensor([3, 0, 2])
    inputs = torch.randn(5, 4)
    for module in (stored, plain):
        projection = Projection(Role.FFN_IN, "c_fc", module, 0, 6)
        assert projection.weight.shape == (6, 4)
        assert projection.transposed == (module is stored)
        assert not projection.fused
        assert torch.allclose(inputs @ projection.weight.T + projection.bias, module(inputs))
    for module in (stored, plain):
        keep_outputs_(module, rows)
        keep_inputs_(module, columns)
    assert torch.allclose(stored(inputs[:, columns]), plain(inputs[:, columns]))
    assert (stored.nf, stored.nx) == (plain.out_features, plain.in_features) == (2, 3)


def test_a_cut_module_keeps_class_mode_hooks_and_gradients(model):
    dense = model("bert").bfloat16()
    module = layers_of(dense)[0].ffn_out.module
    module.eval()
    module.weight.requires_grad_(False)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    keep_inputs_(module, torch.arange(5), weight=torch.randn(32, 5, dtype=torch.float64))
    assert layers_of(dense)[0].ffn_out.module is module
    assert module.weight.dtype == torch.bfloat16
    assert not module.weight.requires_grad
    assert module.bias.requires_grad
    module(torch.zeros(1, 5, dtype=torch.bfloat16))
    assert calls == [1]


def test_projections_are_views_that_tile_their_modules(model, architecture):
    """Each output of each module belongs to exactly one projection, and writing to it reaches the parameter."""
    for layer in layers_of(model(architecture)):
        number = {}
        for role, projection in layer.projections.items():
            assert projection.weight.shape == (projection.out_features, projection.in_features)
            assert layer.module.get_submodule(projection.path) is projection.module
            if projection.bias is not None:
                assert projection.bias.shape == (projection.out_features,)
            if role in NEURON_ROLES:
                assert projection.out_features == layer.num_neurons
            if role in HEAD_ROLES:
                per_unit = layer.head_size if role in (Role.KEY, Role.VALUE) else layer.unit_size
                assert projection.out_features == layer.num_units * per_unit
            number[role] = float(len(number) + 1)
            projection.weight.data.fill_(number[role])
        for projection in layer.projections.values():
            assert bool((projection.weight == number[projection.role]).all())
        written = sum(projection.weight.numel() for projection in layer.projections.values())
        assert written == sum(module.weight.numel() for module in layer.modules.values())
        assert all(bool((module.weight > 0).all()) for module in layer.modules.values())


def cut_and_masked(dense, kept):
    """A model without the units and neurons that are not named, and the dense one with them masked.

    Args:
        dense: The model.
        kept: For each layer the units and the neurons that stay.
    """
    cut, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    for layer, other, (units, neurons) in zip(layers_of(cut), layers_of(masked), kept, strict=True):
        for out, indices, size in ((other.attention_out, units, other.unit_size), (other.ffn_out, neurons, 1)):
            mask = torch.zeros(out.in_features // size, dtype=torch.float64)
            mask[indices] = 1
            multiply_input_(out.module, mask.repeat_interleave(size))
        keep_heads_(layer, units)
        keep_neurons_(layer, torch.tensor(neurons))
    return cut, masked


def test_removal_is_masking(model, batches, architecture):
    dense = model(architecture).double()
    kept = [([layer.index % layer.num_units], list(range(layer.index, 40, 3))) for layer in layers_of(dense)]
    if layers_of(dense)[0].num_units > 2:
        kept[0] = ([1, 3], kept[0][1])
    cut, masked = cut_and_masked(dense, kept)
    assert [layer.num_units for layer in layers_of(cut)] == [len(units) for units, _ in kept]
    assert [layer.num_neurons for layer in layers_of(cut)] == [len(neurons) for _, neurons in kept]
    batch = batches(dense.config, count=1)[0]
    live = real_tokens(batch)
    assert not live.all() or architecture == "vit"
    assert_equal_to_rounding(hidden(cut, batch)[live], hidden(masked, batch)[live])
    assert (hidden(cut, batch)[live] - hidden(dense, batch)[live]).abs().max() > 1e-3


def test_a_skeleton_of_the_same_sizes_takes_the_weights(model, batches, architecture):
    """Also what is not a weight but depends on which heads are left: it travels with the weights."""
    dense = model(architecture)
    kept = [([layer.num_units - 1], [3, 5, 8]) for layer in layers_of(dense)]
    cut, _ = cut_and_masked(dense, kept)
    skeleton = copy.deepcopy(dense)
    for layer in layers_of(skeleton):
        resize_(layer, 1, 3)
    skeleton.load_state_dict(cut.state_dict(), strict=True)
    batch = batches(dense.config, count=1)[0]
    assert_equal_to_rounding(hidden(skeleton, batch), hidden(cut, batch))


def test_heads_that_are_cut_twice_keep_their_own_position_bias(model, batches):
    """MPNet computes one position bias for all heads of the dense model: each head that stays needs its own part."""
    dense = model("mpnet").double()
    kept = [([0, 2, 3], [0, 1]), ([1, 2, 3], [0, 1])]
    twice, _ = cut_and_masked(dense, kept)
    for layer in layers_of(twice):
        keep_heads_(layer, [2])
    once, masked = cut_and_masked(dense, [([3], [0, 1]), ([3], [0, 1])])
    batch = batches(dense.config, count=1)[0]
    live = real_tokens(batch)
    assert_equal_to_rounding(hidden(twice, batch), hidden(once, batch))
    assert_equal_to_rounding(hidden(twice, batch)[live], hidden(masked, batch)[live])
    other, _ = cut_and_masked(dense, [([3], [0, 1]), ([3], [0, 1])])
    for layer in layers_of(other):
        layer.attention.kept_heads.fill_(0)
    assert (hidden(other, batch)[live] - hidden(once, batch)[live]).abs().max() > 1e-3


def test_positions_with_projections_of_their_own(batches):
    """DeBERTa-v2 without shared keys: the projections of positions lose the same heads, and their work is counted."""
    config = ARCHITECTURES["deberta-v2"](share_att_key=False)
    torch.manual_seed(0)
    dense = DebertaV2Model(config).eval().double()
    for layer in layers_of(dense):
        assert {Role.POSITION_QUERY, Role.POSITION_KEY} <= layer.projections.keys()
    cut, masked = cut_and_masked(dense, [([1, 3], [0, 1, 2]), ([2], [5])])
    batch = batches(config, count=1)[0]
    live = batch["attention_mask"].bool()
    assert_equal_to_rounding(hidden(cut, batch)[live], hidden(masked, batch)[live])
    shared = DebertaV2Model(ARCHITECTURES["deberta-v2"]())
    assert count_cost(dense, seq_len=9).macs_by_layer == count_cost(shared, seq_len=9).macs_by_layer
    one_sided = DebertaV2Model(ARCHITECTURES["deberta-v2"](share_att_key=False, pos_att_type=["c2p"]))
    once, each = 16 * 32 * 32, 9 * 16 * 32
    lost = [
        a - b for a, b in zip(count_cost(dense, 9).macs_by_layer, count_cost(one_sided, 9).macs_by_layer, strict=True)
    ]
    assert lost == [once + each] * 2


def test_a_window_of_the_whole_model_is_counted():
    """Mistral's attention modules do not know their window, its config does."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    wide, narrow = (
        MistralModel(MistralConfig(**sizes, vocab_size=99, num_hidden_layers=1, sliding_window=window))
        for window in (None, 3)
    )
    pairs = sum(abs(i - j) < 3 for i in range(10) for j in range(10))
    assert count_cost(wide, 10).macs - count_cost(narrow, 10).macs == 2 * (100 - pairs) * 32
