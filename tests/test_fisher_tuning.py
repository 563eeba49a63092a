"""Scales of what survives: the regression written out, errors that shrink, layers that cannot be tuned."""

import pytest
import torch

from hf_compress.core.architectures import layers_of
from hf_compress.methods.structured_pruning.fisher import (
    Masks,
    collect_gradients,
    fisher_selection,
    tune_masks,
)
from hf_compress.methods.structured_pruning.mask_tuning import masked, normal_equations
from tests.fisher_models import all_true, batches, rearranged, searched, tiny
from tests.images_and_sounds import real_tokens


STREAMS = {
    # Architecture -> modules of a layer whose input is attention plus residual and feed-forward plus residual;
    # None: the next layer.
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "electra": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "modernbert": ("mlp_norm", None),
    "llama": ("post_attention_layernorm", None),
    "opt": ("final_layer_norm", None),
    "opt post-norm": ("self_attn_layer_norm", "final_layer_norm"),
    "vit": ("layernorm_after", None),
    "wav2vec2": ("layer_norm", "final_layer_norm"),
    "wav2vec2-stable": ("final_layer_norm", None),
}


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("name", STREAMS)
def test_normal_equations_match_the_written_out_regression(name, part):
    model = tiny(name)
    blocks, data = layers_of(model), batches(2, model=model)
    torch.manual_seed(1)
    teacher, student = (
        Masks([torch.rand(len(m)) < p for m in full.units], [torch.rand(len(m)) < p for m in full.neurons])
        for full, p in ((all_true(blocks), 0.9), (all_true(blocks), 0.6))
    )
    student.units[1][0] = True
    block, attention = blocks[1], part == "attention"
    linear, size = (block.attention_out, block.unit_size) if attention else (block.ffn_out, 1)
    path = STREAMS[name][0 if attention else 1]
    stream = blocks[2].module if path is None else block.module.get_submodule(path)

    def observe(batch, masks):
        seen = {}

        def entered(module, args, kwargs):
            seen["sum"] = args[0] if args else kwargs["hidden_states"]

        handles = [
            stream.register_forward_pre_hook(entered, with_kwargs=True),
            linear.module.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output)),
        ]
        with masked(blocks, masks), torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        live = real_tokens(batch).flatten()
        return [seen[key].reshape(-1, seen[key].shape[-1])[live] for key in ("x", "y", "sum")]

    if not attention:
        whole = Masks(teacher.units, [teacher.neurons[0], torch.ones_like(teacher.neurons[1]), teacher.neurons[2]])
    gram = cross = 0
    kept = (student.units if attention else student.neurons)[1].nonzero().flatten()
    bias = 0 if linear.bias is None else linear.bias.detach()
    for batch in data:
        target = observe(batch, teacher if attention else whole)[2]
        x, y, total = observe(batch, student)
        target = (target - bias - (total - y)).flatten()
        a = torch.stack([(x[:, u * size : u * size + size] @ linear.weight[:, u * size : u * size + size].T).flatten()
                         for u in kept.tolist()], 1).detach()  # fmt: skip
        a = torch.cat([a, torch.ones(len(a), 1)], 1) if attention else a
        gram, cross = gram + a.T @ a, cross + a.T @ target
    found = normal_equations(model, blocks, data, 1, part, teacher, student)
    torch.testing.assert_close(found[0], gram, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], cross, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "modernbert"])
def test_tuned_ffn_error_is_not_larger(name):
    model = tiny(name)
    blocks, data = layers_of(model), batches()
    gradients = collect_gradients(model, blocks, data)
    teacher, found = (searched(model, gradients, ratio) for ratio in (0.5**0.5, 0.5))
    student = rearranged(gradients, found)
    tuned = tune_masks(model, blocks, data, teacher, student)
    pairs = zip(tuned.units + tuned.neurons, student.units + student.neurons, strict=True)
    assert all(torch.equal(scales != 0, keep) for scales, keep in pairs)
    for layer in range(3):
        kept = student.neurons[layer]
        start = Masks(tuned.units, [*tuned.neurons[:layer], *(m.double() for m in student.neurons[layer:])])
        gram, cross = normal_equations(model, blocks, data, layer, "ffn", teacher, start)
        # Squared errors less the same constant.
        scales = (tuned.neurons[layer][kept], torch.ones_like(cross))
        after, before = (float(a @ gram @ a - 2 * a @ cross) for a in scales)
        assert after <= before + 1e-9 * abs(before)
    assert not torch.equal(tuned.neurons[0], student.neurons[0].double())


def test_the_last_block_is_fitted_to_the_token_that_is_classified():
    for name, place in (("bert", 0), ("opt", -1), ("modernbert", 0), ("vit", 0), ("wav2vec2", None)):
        model = tiny(name)
        blocks, batch = layers_of(model), batches(1, model=model)[0]
        full = all_true(blocks)
        seen = []
        handle = blocks[-1].ffn_out.module.register_forward_hook(
            lambda module, args, output, to=seen: to.append(args[0])
        )
        with torch.no_grad():
            model(**batch)
        handle.remove()
        live = real_tokens(batch)
        rows = seen[0].view(*live.shape, -1)
        places = live.sum(1) - 1 if place else torch.zeros(6, dtype=torch.int64)
        # The mean of a sound is over its real frames.
        h, weight = rows[live] if place is None else rows[torch.arange(6), places], blocks[-1].ffn_out.weight
        gram, _ = normal_equations(model, blocks, [batch], 2, "ffn", full, full)
        torch.testing.assert_close(gram, ((h.T @ h) * (weight.T @ weight)).detach(), rtol=1e-10, atol=1e-12)


def test_a_layer_with_one_neuron_or_one_unit_is_tuned():
    model = tiny()
    blocks, data = layers_of(model), batches(2)
    teacher, student = all_true(blocks), all_true(blocks)
    for layer in range(3):
        student.neurons[layer][1:] = False
        student.units[layer][1:] = False
    tuned = tune_masks(model, blocks, data, teacher, student)
    assert all(int((m != 0).sum()) == 1 for m in tuned.neurons + tuned.units)
    assert tuned.neurons[0][0] != 1


def test_empty_layers_are_skipped_and_large_scales_abort(caplog):
    model = tiny()
    blocks, data = layers_of(model), batches(2)
    teacher, student = all_true(blocks), all_true(blocks)
    student.neurons[0][:], student.units[1][:] = False, False
    student.neurons[1][10:] = False
    tuned = tune_masks(model, blocks, data, teacher, student)
    assert not tuned.neurons[0].any()
    assert not tuned.units[1].any()
    # A neuron kept as such a small copy of a removed one that only a huge scale could replace it.
    with torch.no_grad():
        layer = blocks[0].module
        for tensor in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
            tensor[1] = tensor[0]
        layer.output.dense.weight[:, 0] = 30 * torch.randn(32)
        layer.output.dense.weight[:, 1] = layer.output.dense.weight[:, 0] / 40
    student = all_true(blocks)
    student.neurons[0][0] = False
    tuned = tune_masks(model, blocks, data, teacher, student)
    assert all(torch.equal(t, s.double()) for t, s in zip(tuned.neurons, student.neurons, strict=True))
    assert "Mask tuning stopped at layer 0 (ffn)" in caplog.text


def test_nothing_removed_gives_scales_of_exactly_one():
    model = tiny()
    for layer in fisher_selection(model, layers_of(model), batches(1), 8.0, 1.0, 1, 8, True, True, tune=True):
        assert layer.units == [0, 1, 2, 3]
        assert len(layer.neurons) == 48
        assert (layer.unit_scales == 1).all()
        assert (layer.neuron_scales == 1).all()
