"""Linear attention against loops over examples, tokens and heads, in double precision."""

import copy
import itertools
import logging
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel, RobertaConfig
from transformers.masking_utils import create_bidirectional_mask

import hf_compress as hc
from hf_compress.core.architectures import blocks_of
from hf_compress.methods.linformer.modeling import rebuild
from hf_compress.methods.linformer.projection import TimeProjection, _shorten


HEADS, SIZE, WIDTH = 4, 8, 32
NEAR = {"rtol": 0, "atol": 1e-12}
SHARES = ["none", "kv", "layer"]


@pytest.fixture
def converted(model):
    """`converted(k, **config)`: a tiny model in double precision, and the attention module of its first layer."""

    def make(slots, architecture="bert", head="base", **config):
        linear = hc.compress(model(architecture, head), hc.LinformerConfig(projected_length=slots, **config))
        linear = linear.double().eval()
        return linear, blocks_of(linear)[0].attention

    return make


def states_of(size, length, seed=0):
    return torch.randn(size, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def run(attention, states, live=None, **kwargs):
    """The module called with the mask that transformers would give it."""
    mask = create_bidirectional_mask(attention.config, states, None if live is None else live.long())
    return attention(states, attention_mask=mask, **kwargs)[0]


def project(linear, states):
    return states @ linear.weight.T + linear.bias


def fill(projection, block):
    """Let E and F begin with a matrix and be zero elsewhere."""
    for matrix in (projection.keys, projection.values):
        matrix.data.zero_()
        matrix.data[: block.shape[0], : block.shape[1]] = block


def gap(a, b):
    return float((a - b).detach().abs().max())


@torch.no_grad()
def dense(attention, states, live):
    """Softmax attention over the live tokens, one example and one head after the other."""
    context = torch.empty_like(states)
    for b, tokens in enumerate(live):
        query = project(attention.query, states[b])
        key, value = (project(x, states[b])[tokens] for x in (attention.key, attention.value))
        for h in range(HEADS):
            part = slice(h * SIZE, (h + 1) * SIZE)
            scores = query[:, part] @ key[:, part].T / math.sqrt(SIZE)
            context[b, :, part] = scores.softmax(-1) @ value[:, part]
    return context


@torch.no_grad()
def slow(attention, states, live, slot_mask=False, length_scaling=True):
    """The specification, section 1.2: gather the tokens, sum over them one by one, never fold."""
    projection = attention.attention_core.projection
    keys, values = projection.keys, projection.keys if projection.values is None else projection.values
    context = torch.zeros_like(states)
    for b, tokens in enumerate(live):
        count = int(tokens.sum())
        query = project(attention.query, states[b])
        key, value = (project(x, states[b])[tokens] for x in (attention.key, attention.value))
        scale = 1 / math.sqrt(max(count, 1)) if length_scaling else 1.0
        short_key, short_value = torch.zeros(2, keys.shape[1], WIDTH, dtype=states.dtype)
        for t in range(count):
            short_key += scale * torch.outer(keys[t], key[t])
            short_value += scale * torch.outer(values[t], value[t])
        if slot_mask:
            short_key, short_value = short_key[: max(count, 1)], short_value[: max(count, 1)]
        for h in range(HEADS):
            part = slice(h * SIZE, (h + 1) * SIZE)
            scores = query[:, part] @ short_key[:, part].T / math.sqrt(SIZE)
            context[b, :, part] = scores.softmax(-1) @ short_value[:, part]
    return context


MASKS = {
    "none": None,
    "right": right([12, 5, 9], 12),
    "left": right([12, 5, 9], 12).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0] * 2, [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 12]).bool(),
    "empty rows": right([12, 0, 1], 12),
}


@pytest.mark.parametrize("slots", [4, 20])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("share", SHARES)
def test_equals_the_loop(converted, share, mask, slots):
    for slot_mask, length_scaling in itertools.product((False, True), repeat=2):
        options = {"slot_mask": slot_mask, "length_scaling": length_scaling}
        _, attention = converted(slots, share=share, **options)
        states, live = states_of(3, 12), MASKS[mask]
        seen = run(attention, states, live)
        expected = slow(attention, states, torch.ones(3, 12).bool() if live is None else live, **options)
        assert torch.isfinite(seen).all()
        torch.testing.assert_close(seen, expected, **NEAR)
        assert float(expected.square().mean()) > 1e-3
        torch.testing.assert_close(run(attention, states, live, output_attentions=True), expected, **NEAR)


def test_a_scaled_permutation_is_dense_attention(converted):
    length = 12
    _, attention = converted(length)
    projection, states = attention.attention_core.projection, states_of(2, length)
    expected = dense(attention, states, torch.ones(2, length).bool())
    for order in (torch.arange(length), torch.randperm(length, generator=torch.Generator().manual_seed(1))):
        fill(projection, math.sqrt(length) * torch.eye(length, dtype=torch.float64)[order])
        torch.testing.assert_close(run(attention, states), expected, **NEAR)
    # A rotation is orthogonal too, but softmax does not commute with it.
    rotation = torch.linalg.qr(torch.randn(length, length, generator=torch.Generator().manual_seed(0)).double())[0]
    fill(projection, math.sqrt(length) * rotation)
    assert gap(run(attention, states), expected) > 0.1


def test_unused_slots_count_unless_masked(converted):
    length, slots = 10, 14
    for slot_mask in (False, True):
        _, attention = converted(slots, slot_mask=slot_mask)
        fill(attention.attention_core.projection, math.sqrt(length) * torch.eye(length, dtype=torch.float64))
        states = states_of(2, length)
        error = gap(run(attention, states), dense(attention, states, torch.ones(2, length).bool()))
        assert error < 1e-12 if slot_mask else error > 1e-2
        # One identity serves one length only: a shorter row is off by the ratio of the roots.
        live = right([length, 6], length)
        assert gap(run(attention, states, live)[1], dense(attention, states, live)[1]) > 1e-2


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_pooling_with_enough_slots_is_the_dense_model(model, batches, architecture):
    reference = model(architecture, "sequence_classification").double()
    options = {"slot_mask": True, "length_scaling": False, "initialization": "pooling", "max_tokens": 30}
    linear = hc.compress(copy.deepcopy(reference), hc.LinformerConfig(projected_length=30, **options))
    batch = batches(reference.config, count=1)[0]
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    with torch.no_grad():
        expected, seen = (x(**batch, output_hidden_states=True) for x in (reference, linear))
    torch.testing.assert_close(seen.logits, expected.logits, **NEAR)
    live = batch["attention_mask"].bool()
    for a, b in zip(seen.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[live], b[live], **NEAR)


def test_pooling_averages_neighbours(converted):
    for scaling in (False, True):
        _, attention = converted(8, initialization="pooling", length_scaling=scaling, slot_mask=True)
        stride, projection = 9, attention.attention_core.projection  # 66 positions for 8 slots.
        assert attention.attention_core.slot_stride == stride
        keys, values = projection.keys.tolist(), projection.values.tolist()
        for t, j in itertools.product(range(66), range(8)):
            expected = (math.sqrt(66) if scaling else 1) / stride if t // stride == j else 0.0
            assert keys[t][j] == values[t][j] == pytest.approx(expected)
        # 20 tokens reach three slots of nine tokens; the other slots take no part.
        weights = attention(states_of(1, 20), attention_mask=None, output_attentions=True)[1]
        assert bool((weights[..., :3] > 0).all())
        assert not weights[..., 3:].any()


def test_padding_and_batch_mates_change_nothing(converted):
    _, attention = converted(5)
    states, lengths = states_of(3, 9), [9, 4, 7]
    together = run(attention, states, right(lengths, 9))
    noise, none = 50 * states_of(3, 6, seed=1), torch.zeros(3, 6).bool()
    longer = run(attention, torch.cat([states, noise], 1), right(lengths, 15))
    shifted = run(attention, torch.cat([noise, states], 1), torch.cat([none, right(lengths, 9)], 1))
    for row, length in enumerate(lengths):
        alone = run(attention, states[row : row + 1, :length])
        for seen in (together[row], longer[row], shifted[row, 6:]):
            torch.testing.assert_close(seen[:length], alone[0], **NEAR)


def test_order_of_slots_one_slot_and_no_query(converted):
    _, attention = converted(6)
    projection, states = attention.attention_core.projection, states_of(2, 9)
    before, order = run(attention, states), torch.tensor([3, 1, 5, 0, 2, 4])
    projection.keys.data = projection.keys.data[:, order]
    assert gap(run(attention, states), before) > 1e-2
    projection.values.data = projection.values.data[:, order]
    torch.testing.assert_close(run(attention, states), before, **NEAR)
    # Without queries every slot weighs the same.
    attention.query.weight.data.zero_()
    attention.query.bias.data.zero_()
    value, live = project(attention.value, states), right([9, 4], 9)
    expected = torch.stack([
        sum(projection.values[t, j] * value[b, t] for t in range(count) for j in range(6)) / (6 * math.sqrt(count))
        for b, count in enumerate((9, 4))
    ])  # fmt: skip
    torch.testing.assert_close(run(attention, states, live), expected[:, None].expand(2, 9, WIDTH), **NEAR)


def test_one_slot_ignores_queries_and_keys(converted):
    _, attention = converted(1)
    projection, states = attention.attention_core.projection, states_of(1, 9)
    value = project(attention.value, states)
    expected = sum(projection.values[t, 0] * value[0, t] for t in range(9)) / 3
    torch.testing.assert_close(run(attention, states)[0], expected.expand(9, WIDTH), **NEAR)
    for parameter in (projection.keys, attention.query.weight, attention.key.weight):
        parameter.data.mul_(-3)
    torch.testing.assert_close(run(attention, states)[0], expected.expand(9, WIDTH), **NEAR)


@pytest.mark.parametrize("share", SHARES)
def test_deferred_projection_is_exact_and_chosen_by_cost(converted, share, monkeypatch):
    passes, chosen = 2 if share == "none" else 1, set()
    for slots, length in ((4, 12), (12, 12), (16, 14), (20, 12)):
        _, attention = converted(slots, share=share)
        core, states = attention.attention_core, states_of(3, length)
        plain = 2 * length * WIDTH**2 + 4 * length * slots * WIDTH
        deferred = 2 * slots * WIDTH**2 + passes * length * slots * WIDTH + 2 * length * slots * WIDTH
        assert core.defers(length, WIDTH, WIDTH) == (deferred < plain)
        assert attention.key.is_deferred(length) == (deferred < plain)
        # `key` hands its input through exactly when it is deferred.
        assert (attention.key(states) is states) == (deferred < plain)
        chosen.add(deferred < plain)
        for live in (None, right([length, 3, 7], length), right([length, 3, 7], length).flip(1)):
            results = []
            for defers in (False, True):
                monkeypatch.setattr(core, "defers", lambda *sizes, defers=defers: defers)
                results.append(run(attention, states, live))
            torch.testing.assert_close(*results, **NEAR)
            monkeypatch.undo()
    assert chosen == {False, True}


@pytest.mark.parametrize("slots", [4, 20])
def test_gradients_are_finite_differences(converted, slots):
    _, attention = converted(slots)
    states, live, target = states_of(2, 12), right([10, 7], 12), states_of(2, 12, seed=1)
    names = ["query.weight", "key.weight", "value.weight", "key.bias", "value.bias"]
    names += ["attention_core.projection.keys", "attention_core.projection.values"]
    start = {name: attention.get_parameter(name).detach().clone() for name in names}
    mask = create_bidirectional_mask(attention.config, states, live.long())

    def value(changed):
        return float((functional_call(attention, changed, (states, mask))[0] * target).sum().detach())

    (run(attention, states, live) * target).sum().backward()
    generator = torch.Generator().manual_seed(2)
    for name in names:
        gradient = attention.get_parameter(name).grad
        for _ in range(4):
            direction = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)
            ends = [value({**start, name: start[name] + sign * 1e-5 * direction}) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-5
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6), name
        assert float(gradient.abs().max()) > 1e-4
    for name in names[-2:]:
        gradient = attention.get_parameter(name).grad
        assert not gradient[10:].any()
        assert gradient[:10].abs().sum(1).min() > 0


def test_one_matrix_gets_the_sum_of_all_gradients(model, batches):
    tied = hc.compress(model("bert"), hc.LinformerConfig(projected_length=6, share="layer")).double()
    apart = hc.compress(model("bert"), hc.LinformerConfig(projected_length=6)).double()
    projections = [block.attention.attention_core.projection for block in blocks_of(apart)]
    for projection in projections:
        fill(projection, tied.linformer_projection.keys.data)
    batch = batches(tied.config, count=1)[0]
    for linear in (tied, apart):
        (linear(**batch)[0] * states_of(8, 24)).sum().backward()
    parts = [matrix.grad for projection in projections for matrix in (projection.keys, projection.values)]
    assert len(parts) == 6
    torch.testing.assert_close(tied.linformer_projection.keys.grad, sum(parts), rtol=1e-12, atol=1e-12)


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
    keys = project(blocks_of(linear)[0].attention.key, torch.randn(4, 100, WIDTH))
    short = matrices[0][:100].T @ keys / 10
    assert float(short.square().mean().sqrt() / keys.square().mean().sqrt()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_longer_inputs(model, architecture, tmp_path):
    reference, offset = model(architecture, "sequence_classification"), 2 if architecture == "roberta" else 0
    old = 66 - offset
    config = hc.LinformerConfig(projected_length=8, max_tokens=3 * old + 5)
    linear = hc.compress(model(architecture, "sequence_classification"), config).eval()
    rows = blocks_of(linear)[0].attention.attention_core.projection.keys.shape[0]
    assert linear.config.max_position_embeddings == rows == 3 * old + 5 + offset
    table, grown = (x.base_model.embeddings.position_embeddings.weight for x in (reference, linear))
    assert torch.equal(grown[:66], table)
    for position in range(3 * old + 5):
        assert torch.equal(grown[offset + position], table[offset + position % old])
    short = torch.randint(3, 99, (2, old), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(linear.base_model.embeddings(short), reference.base_model.embeddings(short))
        ids = torch.randint(3, 99, (2, 3 * old + 5), generator=torch.Generator().manual_seed(0))
        seen = linear(ids).logits
        linear.save_pretrained(tmp_path)
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(reloaded(ids).logits, seen)
        # The last token is read.
        assert not torch.equal(linear(torch.cat([ids[:, :-1], (ids[:, -1:] - 3 + 1) % 90 + 3], 1)).logits, seen)


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
        cores = [block.attention.attention_core for block in blocks_of(twin)]
        assert all(core.projection.keys is twin.get_parameter(name) for core in cores)
        with torch.no_grad():
            before = twin.eval()(**batch, output_hidden_states=True).hidden_states
            twin.get_parameter(name).mul_(-1.5)
            after = twin(**batch, output_hidden_states=True).hidden_states
            twin.get_parameter(name).div_(-1.5)
        assert all(not torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))

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


# peft asks transformers for an attribute that is about to be renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("names", [["key"], ["value"], ["key", "value"], ["query"]])
@pytest.mark.parametrize("share", SHARES)
def test_wrapped_projections_give_the_right_numbers(converted, share, names):
    linear, _ = converted(4, share=share)
    adapted = peft.get_peft_model(linear, peft.LoraConfig(r=2, target_modules=names)).double().eval()
    attention = adapted.get_base_model().encoder.layer[0].attention.self
    states, live = states_of(2, 12), right([12, 5], 12)
    merged = copy.deepcopy(attention)
    for name in names:
        wrapped = getattr(attention, name)
        up, down = wrapped.lora_B["default"].weight, wrapped.lora_A["default"].weight
        up.data.normal_(generator=torch.Generator().manual_seed(0))
        plain = torch.nn.Linear(WIDTH, WIDTH).double()
        plain.weight.data = wrapped.base_layer.weight.data + wrapped.scaling["default"] * up.data @ down.data
        plain.bias.data = wrapped.base_layer.bias.data
        setattr(merged, name, plain)
    torch.testing.assert_close(run(attention, states, live), slow(merged, states, live), **NEAR)


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
