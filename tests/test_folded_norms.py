"""Normalisations of empty sublayers that become part of the ones before them.

The oracles are scipy's regressions on activations that hooks have kept, and a case in which nothing is lost.
"""

import copy

import pytest
import torch
import transformers
from scipy import stats
from torch import nn

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.folded_norms import folds_of
from hf_compress.core.surgery import keep_heads_, keep_neurons_
from tests.images_and_sounds import cast
from tests.rounding import assert_equal_to_rounding
from tests.test_empty_sublayers import answers, emptied


KNOWN = ("bert", "roberta", "electra", "distilbert", "mpnet")
FOLDING = {"mac_ratio": 1.0, "min_heads": 0, "min_neurons": 0, "fold_norms": True}


def with_norms_of_its_own(model):
    """Weights and biases that differ from channel to channel, as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            with torch.no_grad():
                module.weight.add_(torch.rand(module.weight.shape, generator=generator) - 0.5)
                module.bias.add_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


def folded(model, data):
    return hc.compress(model, hc.StructuredPruningConfig(**FOLDING), data=data)


def test_the_line_is_that_of_a_regression(model, batches):
    """Two empty sublayers in a row: the second one's input is the first one's output."""
    whole = emptied(with_norms_of_its_own(model("bert")), heads=(1,), neurons=(0,)).double()
    data = batches(whole.config, count=4)
    before = whole.encoder.layer[0].attention.output.LayerNorm
    gone = [whole.encoder.layer[0].output, whole.encoder.layer[1].attention.output]
    with torch.no_grad():
        for module in gone:
            module.dense.bias.copy_(torch.linspace(-0.3, 0.3, 32))
    seen = [([], []) for _ in gone]
    handles = [
        part.LayerNorm.register_forward_hook(
            lambda module, inputs, output, kept=kept: [
                rows.append(states[batch["attention_mask"].bool()].detach())
                for rows, states in zip(kept, (inputs[0], output), strict=True)
            ] and None
        )
        for part, kept in zip(gone, seen, strict=True)
    ]  # fmt: skip
    for batch in data:
        answers(whole, batch)
    for handle in handles:
        handle.remove()
    weight, bias = before.weight.detach().clone(), before.bias.detach().clone()
    for part, kept in zip(gone, seen, strict=True):
        x, y = (torch.cat(rows) for rows in kept)
        lines = [stats.linregress(x[:, channel], y[:, channel]) for channel in range(32)]
        slope, shift = (torch.tensor([getattr(line, name) for line in lines]) for name in ("slope", "intercept"))
        weight, bias = weight * slope, slope * (bias + part.dense.bias.detach()) + shift
    kept_before = sum(p.numel() for p in whole.parameters())
    # Padding that no token of the batches before had changes nothing.
    longer = [{name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()} for batch in data]
    folded(whole, longer)
    torch.testing.assert_close(before.weight, weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(before.bias, bias, rtol=1e-9, atol=1e-12)
    for part in gone:
        assert type(part.LayerNorm) is nn.Identity
        assert part.dense.bias is None
    assert kept_before - sum(p.numel() for p in whole.parameters()) == 2 * 3 * 32


@pytest.mark.parametrize("architecture", KNOWN)
def test_nothing_is_lost_where_nothing_is_left_to_normalise(model, batches, architecture):
    """A normalised token without weights of its own stays what it is when it is normalised again."""
    whole = model(architecture)
    with torch.no_grad():
        for module in whole.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        emptied(whole, heads=(0, 1, 2), neurons=(1,))
        for block in layers_of(whole):
            for projection in (block.attention_out, block.ffn_out):
                if not projection.in_features:
                    projection.module.bias.zero_()
    (batch,) = batches(whole.config, count=1)
    expected, sizes = answers(whole, batch), len(list(whole.parameters()))
    folded(whole, batches(whole.config, count=3))
    # Electra's embeddings have a width of their own: a projection stands before the first layer.
    folds = len(layers_of(whole)) + (0 if architecture == "electra" else 1)
    assert len(list(whole.parameters())) == sizes - 3 * folds
    assert_equal_to_rounding(answers(whole, batch), expected)


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_folded_model_opens_again_and_can_be_pruned_further(model, batches, architecture, tmp_path):
    whole = emptied(with_norms_of_its_own(model(architecture)), heads=(1,), neurons=(0,))
    data = batches(whole.config)
    assert len(folds_of(whole)) == 2
    folded(whole, data)
    assert not folds_of(whole)
    for place, settings in enumerate(
        [{}, {"target": "dense"}, {"selection": "magnitude"}, {"target": "dense", "allocation": "divergence"}]
    ):
        again = hc.StructuredPruningConfig(
            mac_ratio=0.8, min_heads=0, min_neurons=0, fold_norms=bool(place % 2), ridge=1e-3, **settings
        )
        smaller = hc.compress(copy.deepcopy(whole), again, data=data)
        assert not (again.fold_norms and folds_of(smaller))
        smaller.save_pretrained(tmp_path / str(place))
        opened = type(whole).from_pretrained(tmp_path / str(place))
        ours, theirs = opened.state_dict(), smaller.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        batch = data[0]
        assert_equal_to_rounding(answers(opened, batch), answers(smaller, batch))
        assert torch.isfinite(answers(smaller, batch)).all()


def test_every_weight_that_is_left_has_a_gradient(model, batches):
    whole = model("bert")
    emptied(whole, heads=(0, 1), neurons=(1,))
    data = batches(whole.config, count=2)
    folded(whole, data)
    whole(**cast(data[0], whole))[0].square().mean().backward()
    assert {name for name, p in whole.named_parameters() if p.grad is None} <= {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


def test_the_outputs_move_less_than_without_the_sublayer(model, batches):
    """Far less than what the removal of the sublayers themselves moves."""
    whole = with_norms_of_its_own(model("bert"))
    data = batches(whole.config)
    dense = torch.cat([answers(whole, batch)[batch["attention_mask"].bool()] for batch in data])
    for index in (0, 2):
        keep_heads_(layers_of(whole)[index], [])
    keep_neurons_(layers_of(whole)[1], torch.tensor([], dtype=torch.int64))
    removed, both = (
        torch.cat([answers(each, batch)[batch["attention_mask"].bool()] for batch in data])
        for each in (whole, folded(copy.deepcopy(whole), data))
    )
    assert float((both - removed).norm()) < 0.3 * float((removed - dense).norm())
    assert float((both - removed).norm()) > 0


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("gpt2", {}, "fold_norms must be false for gpt2: it is for encoders that normalise after each sublayer"),
        ("deberta-v2", {}, "fold_norms must be false for deberta-v2"),
        ("vit", {}, "fold_norms must be false for vit"),
        ("bert", {"min_heads": 1, "min_neurons": 8}, "fold_norms must go with min_heads=0 or min_neurons=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded(model, batches, architecture, settings, message):
    whole = model(architecture)
    with pytest.raises(ValueError, match=message):
        hc.compress(whole, hc.StructuredPruningConfig(**{**FOLDING, **settings}), data=batches(whole.config, count=1))


def test_cross_attention_is_refused(batches):
    """Its normalisation lies between the two that would become one."""
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    crossed = transformers.BertModel(transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match="fold_norms must be false for bert: .* without cross-attention"):
        hc.compress(crossed, hc.StructuredPruningConfig(**FOLDING), data=batches(crossed.config, count=1))


def test_few_tokens_are_refused(model, batches):
    whole = emptied(model("bert"), neurons=(0,))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    (batch,) = batches(whole.config, count=1)
    with pytest.raises(ValueError, match="fold_norms needs at least 100 tokens .* got 8"):
        folded(whole, [{**batch, "attention_mask": (torch.arange(24) < 1).long().expand(8, -1)}])
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_a_call_that_fails_after_the_fold_leaves_the_model_as_it_was(model, batches):
    whole = emptied(model("bert"), neurons=(0,))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    impossible = hc.StructuredPruningConfig(mac_ratio=0.8, selection="fisher", min_neurons=0)
    with pytest.raises(ValueError, match="labels"):
        hc.compress(whole, hc.StructuredPruningConfig(**FOLDING), impossible, data=batches(whole.config, count=2))
    after = whole.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_half_precision_and_frozen_weights_stay_what_they_are(model, batches):
    whole = emptied(model("bert"), neurons=(0,)).bfloat16()
    before = whole.encoder.layer[0].attention.output.LayerNorm
    before.weight.requires_grad_(False)
    folded(whole, batches(whole.config, count=2))
    assert (before.weight.dtype, before.weight.requires_grad) == (torch.bfloat16, False)
    assert (before.bias.dtype, before.bias.requires_grad) == (torch.bfloat16, True)


def test_a_folded_model_may_be_centred(model, batches):
    """It has no bias where nothing is left to be centred."""
    data = batches(model("bert").config)
    whole = folded(emptied(model("bert"), neurons=(0,)), data)
    hc.compress(whole, hc.StructuredPruningConfig(mac_ratio=0.6, center=True, min_neurons=0), data=data)
    assert torch.isfinite(answers(whole, data[0])).all()


def test_data_are_asked_for(model):
    with pytest.raises(ValueError, match="fold_norms=True"):
        hc.compress(model("bert"), hc.StructuredPruningConfig(**FOLDING))


def test_a_graph_has_fewer_operators_and_the_same_outputs(model, batches, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    whole = emptied(with_norms_of_its_own(model("bert", "sequence_classification")), heads=(1,), neurons=(0, 2))
    data = batches(whole.config, count=2)
    counts = {}
    for name in ("whole", "folded"):
        hc.export_onnx(whole, tmp_path / name, data)
        exported = hc.OnnxModel.from_pretrained(tmp_path / name)
        assert_equal_to_rounding(answers(exported, data[1]), answers(whole, data[1]))
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        counts[name] = [node.op_type for node in graph.node].count("LayerNormalization")
        folded(whole, data)
    assert (counts["whole"], counts["folded"]) == (7, 4)
