"""Linear attention inside whole models: parameters, lengths and their warnings, refusals, saving, cost."""

import copy
import itertools
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel, RobertaConfig

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.linformer.modeling import rebuild
from hf_compress.methods.linformer.projection import TimeProjection, _shorten
from tests.linear_attention import HEADS, SHARES, WIDTH, project
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


@pytest.mark.parametrize(("share", "added"), [("none", 3_158_016), ("kv", 1_579_008), ("layer", 131_584)])
def test_parameter_counts_at_full_size(share, added):
    with torch.device("meta"):
        base = AutoModel.from_config(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
        before = sum(p.numel() for p in base.parameters())
        rebuild(base, hc.LinformerConfig(share=share, max_tokens=512, slot_stride=1))
    assert sum(p.numel() for p in base.parameters()) - before == added


@pytest.mark.parametrize("share", SHARES)
def test_everything_else_keeps_name_and_value(model, share):
    before = model("roberta", "sequence_classification").state_dict()
    linear = hc.compress(model("roberta", "sequence_classification"), hc.LinformerConfig(share=share))
    after = linear.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    parts = ("keys", "values", "longest") if share == "none" else ("keys", "longest")
    owners = [f"roberta.encoder.layer.{i}.attention.self.attention_core.projection" for i in range(2)]
    owners = ["roberta.linformer_projection"] if share == "layer" else owners
    assert set(after) - set(before) == {f"{owner}.{part}" for owner in owners for part in parts}
    # Rows 0..65: one a position, RoBERTa's two special ones included; 256 slots.
    assert {tuple(after[f"{owner}.keys"].shape) for owner in owners} == {(66, 256)}


def test_initial_matrices():
    def build(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 8, "num_hidden_layers": 2}
        config = RobertaConfig(vocab_size=9, max_position_embeddings=514, attention_probs_dropout_prob=0.0, **sizes)
        return hc.compress(AutoModel.from_config(config), hc.LinformerConfig(seed=seed))

    linear, again, other = build(0), build(0), build(1)
    linear.requires_grad_(False)
    matrices = [p for name, p in linear.named_parameters() if "projection" in name]
    assert len(matrices) == 4
    for matrix in matrices:
        assert tuple(matrix.shape) == (514, 256)
        assert abs(float(matrix.mean())) < 0.01
        assert abs(float(matrix.std()) - 1) < 0.01
    assert all(float((a - b).abs().mean()) > 1 for a, b in itertools.combinations(matrices, 2))
    named, others = dict(linear.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in again.named_parameters())
    assert not any(torch.equal(p, named[name]) for name, p in others.items() if "projection" in name)
    keys = project(layers_of(linear)[0].attention.key, torch.randn(4, 100, WIDTH))
    short = matrices[0][:100].T @ keys / 10
    assert float(short.square().mean().sqrt() / keys.square().mean().sqrt()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_longer_inputs(model, architecture, tmp_path):
    reference, offset = model(architecture, "sequence_classification"), 2 if architecture == "roberta" else 0
    old = 66 - offset
    config = hc.LinformerConfig(projected_length=8, max_tokens=3 * old + 5)
    linear = hc.compress(model(architecture, "sequence_classification"), config).eval()
    rows = layers_of(linear)[0].attention.attention_core.projection.keys.shape[0]
    assert linear.config.max_position_embeddings == rows == 3 * old + 5 + offset
    table, grown = (x.base_model.embeddings.position_embeddings.weight for x in (reference, linear))
    assert torch.equal(grown[:66], table)
    for position in range(3 * old + 5):
        assert torch.equal(grown[offset + position], table[offset + position % old])
    short = torch.randint(3, 99, (2, old), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equal_to_rounding(linear.base_model.embeddings(short), reference.base_model.embeddings(short))
        ids = torch.randint(3, 99, (2, 3 * old + 5), generator=torch.Generator().manual_seed(0))
        seen = linear(ids).logits
        linear.save_pretrained(tmp_path)
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert_equal_to_rounding(reloaded(ids).logits, seen)
        # The last token is read.
        other = linear(torch.cat([ids[:, :-1], (ids[:, -1:] - 3 + 1) % 90 + 3], 1)).logits
        assert differ_beyond_rounding(other, seen)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_too_long_inputs_are_refused(model, architecture):
    linear = hc.compress(model(architecture), hc.LinformerConfig(projected_length=4, max_tokens=16)).eval()
    linear(torch.full((1, 16), 5))
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        linear(torch.full((1, 17), 5))


def test_warning_beyond_the_longest_trained_input(model, tmp_path, caplog):
    linear = hc.compress(model("bert"), hc.LinformerConfig(projected_length=4)).eval()
    caplog.set_level(logging.WARNING)

    def look(length, read=None):
        caplog.clear()
        (read or linear)(torch.full((1, length), 5))
        return [record.getMessage() for record in caplog.records]

    assert not look(30)  # Nothing was trained yet: every row is random, and that is known.
    linear.train()
    assert not look(12) + look(9)
    linear.eval()
    assert not look(12)
    first = look(30)
    assert len(first) == 3  # One a layer.
    assert "30 tokens, the longest in training had 12" in first[0]
    assert not look(30)
    linear.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    assert not look(12, reloaded)
    assert len(look(13, reloaded)) == 3


@pytest.mark.parametrize("share", ["none", "layer"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_the_longest_input(model, caplog, share, side):
    linear = hc.compress(model("bert"), hc.LinformerConfig(projected_length=4, share=share)).train()
    projections = [module for module in linear.modules() if isinstance(module, TimeProjection)]
    caplog.set_level(logging.WARNING)

    def look(*lengths, width=30):
        caplog.clear()
        live = torch.arange(width) < torch.tensor(lengths)[:, None]
        linear(torch.full(live.shape, 5), (live if side == "right" else live.flip(1)).long())
        return [record.getMessage() for record in caplog.records]

    look(7, 11)
    look(9, 8)
    assert [int(projection.longest) for projection in projections] == [11] * len(projections)
    linear.eval()
    assert not look(11, 3) + look(2, 10)
    warned = look(5, 12)
    assert len(warned) == len(projections)
    assert "12 tokens, the longest in training had 11" in warned[0]
    assert not look(5, 12)


def test_causal_models_are_refused():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = BertModel(BertConfig(**sizes, intermediate_size=8, is_decoder=True))
    with pytest.raises(ValueError, match="bidirectional encoder"):
        hc.compress(decoder, hc.LinformerConfig())


def test_output_attentions(model, batches):
    linear = hc.compress(model("roberta"), hc.LinformerConfig(projected_length=7)).eval()
    batch = batches(linear.config, count=1)[0]
    with torch.no_grad():
        seen = linear(**batch, output_attentions=True)
        torch.testing.assert_close(seen.last_hidden_state, linear(**batch).last_hidden_state)
    assert [tuple(weights.shape) for weights in seen.attentions] == [(8, HEADS, 24, 7)] * 2
    torch.testing.assert_close(seen.attentions[0].sum(-1), torch.ones(8, HEADS, 24))


def test_shared_matrix_is_registered_once(model, batches, tmp_path):
    linear = hc.compress(model("roberta", "sequence_classification"), hc.LinformerConfig(share="layer", seed=1))
    batch = batches(linear.config, count=1)[0]
    name = "roberta.linformer_projection.keys"

    def moves_together(twin):
        names = [key for key in twin.state_dict() if "projection" in key]
        assert names == [name, "roberta.linformer_projection.longest"]
        cores = [block.attention.attention_core for block in layers_of(twin)]
        assert all(core.projection.keys is twin.get_parameter(name) for core in cores)
        with torch.no_grad():
            before = twin.eval()(**batch, output_hidden_states=True).hidden_states
            twin.get_parameter(name).mul_(-1.5)
            after = twin(**batch, output_hidden_states=True).hidden_states
            twin.get_parameter(name).div_(-1.5)
        assert all(differ_beyond_rounding(a, b) for a, b in zip(before[1:], after[1:], strict=True))

    linear.save_pretrained(tmp_path)
    assert [key for key in load_file(tmp_path / "model.safetensors") if key.endswith("keys")] == [name]
    reloaded, twin = AutoModelForSequenceClassification.from_pretrained(tmp_path), copy.deepcopy(linear)
    for each in (linear, twin, reloaded, copy.deepcopy(linear).bfloat16(), copy.deepcopy(linear).half().double()):
        moves_together(each)
    start = linear.get_parameter(name).clone()
    other = hc.compress(model("roberta", "sequence_classification"), hc.LinformerConfig(share="layer", seed=2))
    assert not torch.equal(other.get_parameter(name), start)
    for stranger in (other, twin, reloaded):
        stranger.get_parameter(name).data.zero_()
    assert torch.equal(linear.get_parameter(name), start)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_another_attention_is_refused(model, batches, architecture, other):
    linear = hc.compress(model(architecture), hc.LinformerConfig(projected_length=4))
    linear.set_attn_implementation(other)
    # Older releases ignore the call for ModernBERT.
    linear.config._attn_implementation = other
    with pytest.raises(ValueError, match="attn_implementation"):
        linear(**batches(linear.config, count=1)[0])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("length", [8, 60, 1000])
def test_cost_is_the_hand_count(model, share, length):
    slots, d, f = 16, 32, 64
    cost = hc.count_cost(
        hc.compress(model("roberta"), hc.LinformerConfig(projected_length=slots, share=share)), length
    )
    rest = 2 * length * d * d + 2 * length * d * f  # Queries, output, feed-forward.
    plain = 2 * length * d * d + 4 * length * slots * d
    shortened = 1 if share != "none" else 2
    folded = shortened * length * slots * d + 2 * slots * d * d + 2 * length * slots * d
    assert cost.macs_by_layer == [rest + min(plain, folded)] * 2


@pytest.mark.parametrize("lost", ["keys", "values", "longest"])
@pytest.mark.parametrize("architecture", ["roberta", "modernbert"])
def test_weights_without_projections_do_not_load(model, tmp_path, architecture, lost):
    hc.compress(model(architecture), hc.LinformerConfig(projected_length=8)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith(f"projection.{lost}")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"attention_core.projection.{lost}"):
        AutoModel.from_pretrained(tmp_path)


def test_pooling_reaches_every_token(model):
    config = hc.LinformerConfig(projected_length=4, initialization="pooling", slot_stride=2, max_tokens=16)
    with pytest.raises(ValueError, match="slot_stride must be at least 4 for 16 tokens and 4 slots, got 2"):
        hc.compress(model("bert"), config)


def test_shortening_can_be_traced_for_other_batch_sizes():
    few, many = (torch.randn(batch, 3, 12, 4) for batch in (2, 5))
    rows = torch.nn.Parameter(torch.randn(12, 8))
    traced = torch.jit.trace(_shorten, (few, rows), check_trace=False)
    expected = torch.einsum("bhsd,sk->bkhd", many, rows).flatten(2)
    torch.testing.assert_close(traced(many, rows), expected)
