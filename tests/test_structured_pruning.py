"""What structural pruning makes of a model, against masking, least squares and exact redundancy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.projections import HEAD_ROLES, NEURON_ROLES, Role
from hf_compress.core.surgery import unit_columns
from tests.images_and_sounds import cast, real_tokens
from tests.rounding import assert_equal_to_rounding


def recorded(model, projections, data):
    """Inputs of some projections as numpy matrices, padding left out."""
    rows = {key: [] for key in projections}

    def recorder(key):
        return lambda module, inputs: rows[key].append(inputs[0].reshape(-1, inputs[0].shape[-1])[live])

    handles = [out.module.register_forward_pre_hook(recorder(key)) for key, out in projections.items()]
    with torch.no_grad():
        for batch in data:
            live = real_tokens(batch).flatten()
            model.base_model(**cast(batch, model))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts).double().numpy() for key, parts in rows.items()}


def outputs_of(blocks):
    return {(b.index, kind): out for b in blocks for kind, out in (("h", b.attention_out), ("n", b.ffn_out))}


def kept_columns(dense, pruned):
    """For each output projection, which of its inputs are left: found by the rows of the layer that makes them."""
    result = {}
    for before, after in zip(layers_of(dense), layers_of(pruned), strict=True):
        values, left = (x.projection(Role.VALUE).weight.detach() for x in (before, after))
        rows = [int((values == wanted).all(1).nonzero()) for wanted in left]
        units = sorted({r // before.head_size for r in rows})
        assert rows == unit_columns(units, before.head_size).tolist()
        result[before.index, "h"] = unit_columns(units, before.unit_size).tolist()
        first, left = (x.projection(Role.FFN_IN).weight.detach() for x in (before, after))
        result[before.index, "n"] = [int((first == wanted).all(1).nonzero()) for wanted in left]
        assert result[before.index, "n"] == sorted(result[before.index, "n"])
    return result


def refit(inputs, columns, weight, intercept=False):
    """The output projection on kept columns that fits the dense one best, and its loss."""
    target = inputs @ weight.detach().double().numpy().T
    basis = inputs[:, columns]
    if intercept:
        basis = np.hstack([basis, np.ones((len(basis), 1))])
    return torch.from_numpy(np.linalg.lstsq(basis, target, rcond=None)[0].T), target


def assert_refitted(dense, pruned, data, rtol=1e-6):
    inputs = recorded(dense, outputs_of(layers_of(dense)), data)
    new, changed = outputs_of(layers_of(pruned)), 0
    kept = kept_columns(dense, pruned)
    for key, old in outputs_of(layers_of(dense)).items():
        expected, _ = refit(inputs[key], kept[key], old.weight)
        assert torch.linalg.norm(new[key].weight - expected) < rtol * torch.linalg.norm(expected)
        assert (old.bias is None) == (new[key].bias is None)
        assert old.bias is None or torch.equal(old.bias, new[key].bias)
        changed += len(kept[key]) < old.in_features
    assert changed >= 3


def hidden(model, batch):
    with torch.no_grad():
        return model(**cast(batch, model)).last_hidden_state


def relative(value, reference):
    return float((value - reference).norm() / reference.norm())


def test_keeping_everything_changes_nothing(model, batches, architecture):
    dense = model(architecture)
    batch = batches(dense.config)[0]
    expected, modules = hidden(dense, batch), dict(dense.named_modules())
    hc.compress(dense, hc.StructuredPruningConfig(mac_ratio=1.0), data=[batch])
    assert_equal_to_rounding(hidden(dense, batch), expected)
    assert all(module is modules[name] for name, module in dense.named_modules())
    assert hc.steps_of(dense)[0]["mac_ratio"] == 1.0


@pytest.mark.parametrize("selection", ["interpolative", "magnitude", "random"])
def test_removal_equals_masking(model, batches, architecture, selection):
    dense = model(architecture).double()
    data = batches(dense.config)
    config = hc.StructuredPruningConfig(mac_ratio=0.5, selection=selection, correction=False)
    pruned = hc.compress(copy.deepcopy(dense), config, data=data)
    kept = kept_columns(dense, pruned)
    masked = copy.deepcopy(dense)
    for key, out in outputs_of(layers_of(masked)).items():
        removed = [column for column in range(out.in_features) if column not in kept[key]]
        out.weight.data[:, removed] = 0
    live = real_tokens(data[1])
    assert relative(hidden(pruned, data[1])[live], hidden(masked, data[1])[live]) < 1e-12
    assert relative(hidden(pruned, data[1])[live], hidden(dense, data[1])[live]) > 1e-3


def test_correction_is_the_least_squares_refit(model, batches, architecture):
    dense = model(architecture).double()
    data = batches(dense.config)
    pruned = hc.compress(copy.deepcopy(dense), hc.StructuredPruningConfig(mac_ratio=0.6), data=iter(data))
    assert_refitted(dense, pruned, data)


def test_centring_fits_an_intercept(model, batches):
    dense = model("bert").double()
    data = batches(dense.config)
    pruned = hc.compress(copy.deepcopy(dense), hc.StructuredPruningConfig(mac_ratio=0.6, center=True), data=data)
    inputs, kept = recorded(dense, outputs_of(layers_of(dense)), data), kept_columns(dense, pruned)
    for key, new in outputs_of(layers_of(pruned)).items():
        old = outputs_of(layers_of(dense))[key]
        if len(kept[key]) < old.in_features:
            expected, _ = refit(inputs[key], kept[key], old.weight, intercept=True)
            assert torch.allclose(new.weight, expected[:, :-1], atol=1e-8)
            assert torch.allclose(new.bias, old.bias + expected[:, -1], atol=1e-8)


def test_sequential_fits_on_the_pruned_prefix(model, batches):
    dense = model("bert").double()
    data = batches(dense.config)
    # Data that can be read once is enough.
    pruned = hc.compress(
        copy.deepcopy(dense), hc.StructuredPruningConfig(mac_ratio=0.6, order="sequential"), data=iter(data)
    )
    kept, changed = kept_columns(dense, pruned), 0
    # Put back one dense half of a layer after the other: what it sees then is what it saw when it was cut.
    for index, layer in enumerate(dense.encoder.layer):
        for kind, parts in (("h", ("attention", "intermediate", "output")), ("n", ("intermediate", "output"))):
            hybrid = copy.deepcopy(pruned)
            for part in parts:
                setattr(hybrid.encoder.layer[index], part, copy.deepcopy(getattr(layer, part)))
            module = outputs_of(layers_of(hybrid))[index, kind]
            inputs = recorded(hybrid, {0: module}, data)[0]
            new = outputs_of(layers_of(pruned))[index, kind].weight
            expected, _ = refit(inputs, kept[index, kind], module.weight)
            assert torch.allclose(new, expected, atol=1e-8)
            changed += new.shape != module.weight.shape
    assert changed >= 3


@pytest.mark.parametrize("selection", ["interpolative", "magnitude", "random"])
def test_loss_falls_with_size_and_with_correction(model, batches, selection):
    dense = model("bert").double()
    data = batches(dense.config)
    inputs = recorded(dense, outputs_of(layers_of(dense)), data)

    def losses(**settings):
        config = hc.StructuredPruningConfig(selection=selection, allocation="uniform", **settings)
        pruned = hc.compress(copy.deepcopy(dense), config, data=data)
        kept, result = kept_columns(dense, pruned), {}
        for key, new in outputs_of(layers_of(pruned)).items():
            target = inputs[key] @ outputs_of(layers_of(dense))[key].weight.detach().numpy().T
            error = inputs[key][:, kept[key]] @ new.weight.detach().numpy().T - target
            result[key] = np.linalg.norm(error) / np.linalg.norm(target)
        return kept, result

    kept, corrected = losses(mac_ratio=0.5)
    kept_plain, plain = losses(mac_ratio=0.5, correction=False)
    assert kept == kept_plain
    assert all(corrected[key] <= plain[key] for key in plain)
    assert sum(corrected.values()) < 0.9 * sum(plain.values())
    for ratio in (0.7, 0.9):
        _, larger = losses(mac_ratio=ratio)
        assert all(larger[key] <= corrected[key] + 1e-12 for key in larger)
        corrected = larger


@pytest.mark.parametrize("order", ["one_shot", "sequential"])
def test_padding_does_not_matter(model, batches, architecture, order):
    dense = model(architecture).double()
    data = batches(dense.config, count=6)
    if architecture == "vit":
        pytest.skip("images have no padding")
    padded, (main,) = [], data[0].keys() - {"attention_mask"}
    for batch in data:
        pad = torch.full((8, 7), 0 if main == "input_values" else dense.config.pad_token_id)
        padded.append({main: torch.cat([batch[main], pad.to(batch[main])], 1),
                       "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(pad)], 1)})  # fmt: skip
    config = hc.StructuredPruningConfig(mac_ratio=0.6, order=order)
    a, b = (hc.compress(copy.deepcopy(dense), config, data=d).state_dict() for d in (data, padded))
    for name, value in a.items():
        assert value.shape == b[name].shape
        assert not value.is_floating_point() or torch.allclose(value, b[name], rtol=0, atol=1e-10)


def redundant_neurons(dense, distinct, generator):
    """Make every neuron beyond the first `distinct` a copy of one of them; what it is used for stays its own."""
    for block in layers_of(dense):
        width = block.num_neurons
        source = torch.cat([torch.arange(distinct), torch.randint(distinct, (width - distinct,), generator=generator)])
        for role, projection in block.projections.items():
            if role in NEURON_ROLES:
                for values in (projection.weight, projection.bias):
                    if values is not None:
                        values.data.copy_(values.data[source])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "opt"])
def test_duplicated_neurons_are_removed_without_loss(model, batches, architecture, dtype, bound):
    dense = model(architecture).to(dtype)
    redundant_neurons(dense, 40, torch.Generator().manual_seed(1))
    blocks = layers_of(dense)
    spare = sum(24 * block.macs_per_neuron(18) for block in blocks)
    ratio = 1 - spare / hc.count_cost(dense, seq_len=18).macs
    config = hc.StructuredPruningConfig(mac_ratio=ratio + 1e-6, seq_len=18, prune_heads=False)
    pruned = hc.compress(copy.deepcopy(dense), config, data=batches(dense.config))
    assert [block.num_neurons for block in layers_of(pruned)] == [40] * len(blocks)
    unseen = batches(dense.config, seed=1)[0]
    live = real_tokens(unseen)
    assert relative(hidden(pruned, unseen)[live], hidden(dense, unseen)[live]) < bound


@pytest.mark.parametrize("image", [0, 1])
def test_heads_that_are_images_of_others_are_removed_without_loss(model, batches, architecture, image):
    dense = model(architecture).double()
    blocks, generator = layers_of(dense), torch.Generator().manual_seed(2)
    if architecture == "mpnet":
        table = dense.encoder.relative_attention_bias.weight.data
        table[:, image] = table[:, 1 - image]
    for block in blocks:
        d, source = block.head_size, 1 - image
        mixing = 0.3 * torch.randn(d, d, dtype=torch.float64, generator=generator)
        for role, projection in block.projections.items():
            if role not in HEAD_ROLES:
                continue
            here, there = (
                unit_columns([unit], d if role in (Role.KEY, Role.VALUE) else block.unit_size)
                for unit in (image, source)
            )
            for values in (projection.weight, projection.bias):
                if values is not None:
                    values.data[here] = mixing @ values.data[there] if role is Role.VALUE else values.data[there]
    spare = sum(block.macs_per_unit(18) for block in blocks)
    ratio = 1 - spare / hc.count_cost(dense, seq_len=18).macs
    config = hc.StructuredPruningConfig(mac_ratio=ratio + 1e-6, seq_len=18, prune_neurons=False)
    pruned = hc.compress(copy.deepcopy(dense), config, data=batches(dense.config))
    assert [block.num_units for block in layers_of(pruned)] == [block.num_units - 1 for block in blocks]
    unseen = batches(dense.config, seed=1)[0]
    live = real_tokens(unseen)
    assert relative(hidden(pruned, unseen)[live], hidden(dense, unseen)[live]) < 1e-8


def test_bookkeeping_of_heads(model, batches):
    config = hc.StructuredPruningConfig(mac_ratio=0.45, allocation="uniform", ridge=1e-6)
    opt = hc.compress(model("opt"), config, data=batches(model("opt").config))
    for block in layers_of(opt):
        assert block.attention.num_heads * 8 == block.projection(Role.QUERY).out_features < 32
    llama = model("llama", "causal_lm")
    hc.compress(llama, config, data=batches(llama.config))
    assert [block.num_units for block in layers_of(llama)] == [1, 1]
    for block in layers_of(llama):
        assert block.attention.num_key_value_groups == 2
        assert block.projection(Role.QUERY).out_features == 2 * block.projection(Role.KEY).out_features == 16


def test_dtype_mode_and_gradients_stay(model, batches):
    half = model("bert").bfloat16().train()
    half.encoder.layer[0].output.dense.weight.requires_grad_(False)
    hc.compress(half, hc.StructuredPruningConfig(mac_ratio=0.5), data=batches(half.config))
    assert half.training
    assert all(module.training for module in half.modules())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert [n for n, p in half.named_parameters() if not p.requires_grad] == ["encoder.layer.0.output.dense.weight"]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in half.parameters())
