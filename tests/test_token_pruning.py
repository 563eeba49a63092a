"""What token pruning computes: removal equals masking, what is kept, refusals, cost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.token_pruning.importance import keep_above, keep_top, token_importance
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.methods.token_pruning.training import regularizer
from hf_compress.report.tokens import trace_tokens, write_token_page
from tests.rounding import assert_equal_to_rounding


HEAD = "sequence_classification"

ENCODERS = pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "distilbert"])

NEAR = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def pruned(model):
    """`pruned(architecture, head, **fields)`: a tiny double-precision model that drops tokens."""

    def make(architecture="bert", head=HEAD, **fields):
        return hc.compress(model(architecture, head).double(), hc.TokenPruningConfig(**fields))

    return make


def run(model, batch):
    state = LiveTokens()
    with torch.no_grad():
        return model(**batch, forward_state=state).logits, state


@ENCODERS
@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.0}, {"prune_mode": "topk", "token_keep_rate": 1.0},
], ids=["threshold", "topk"])  # fmt: skip
def test_neutral_settings_are_the_dense_model(model, batches, architecture, fields):
    dense = model(architecture, HEAD).double()
    batch = batches(dense.config, count=1)[0]
    with torch.no_grad():
        expected = dense(**batch).logits
    same = hc.compress(copy.deepcopy(dense), hc.TokenPruningConfig(**fields))
    logits, state = run(same, batch)
    torch.testing.assert_close(logits, expected, **NEAR)
    for block in layers_of(same)[:-1]:
        assert torch.equal(state.kept_after(block.index), batch["attention_mask"].bool())


def masked_logits(model, batch, decide):
    """Attention and pruning written out for one example at a time, with masks and without removing anything."""
    layers, logits, kept = [b.module for b in layers_of(model)], [], []
    embed = model.base_model.embeddings
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hidden = embed(input_ids=ids[None])[0]
        live, initial, counts = mask.bool().clone(), int(mask.sum()), []
        for index, layer in enumerate(layers):
            own = layer.attention.self
            query, key, value = (
                f(hidden).unflatten(-1, (4, 8)).transpose(0, 1) for f in (own.query, own.key, own.value)
            )
            scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~live, -torch.inf)
            weights = scores.softmax(-1)
            context = (weights @ value).transpose(0, 1).flatten(1)
            received = weights.mean(0)[live].sum(0)
            keep = decide(index, received, live, initial)
            keep[0] = True
            live = live & keep
            hidden = layer.feed_forward_chunk(layer.attention.output(context, hidden))
            counts.append(int(live.sum()))
        kept.append(counts)
        logits.append(hidden)
    return torch.stack(logits), kept


@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.014}, {"final_token_threshold": 0.05, "score_norm": "live"},
    {"final_token_threshold": 0.05, "scoring_mode": "mean_norm"},
    {"final_token_threshold": 0.05, "score_norm": "initial", "threshold_ramp": "one_based"},
], ids=["reference", "live", "mean_norm", "initial"])  # fmt: skip
def test_removal_equals_masking(pruned, batches, fields):
    model = pruned("bert", "token_classification", **fields)
    batch = batches(model.config, count=1)[0]
    theta = thresholds_of(model).values.tolist()
    norm = "live" if fields.get("scoring_mode") == "mean_norm" else fields.get("score_norm", "reference")

    def decide(index, received, live, initial):
        if theta[index] == 0:
            return live.clone()
        divisor = {"reference": 128, "live": int(live.sum()), "initial": initial}[norm]
        return received / divisor >= max(1e-5, theta[index])

    with torch.no_grad():
        hidden, expected = masked_logits(model, batch, decide)
        state = LiveTokens()
        ours = model.base_model(**batch, forward_state=state).last_hidden_state
    counts = torch.stack([state.fed[i] for i in range(3)], 1).tolist()
    assert counts == expected
    assert any(row[-1] < row[0] for row in counts)
    final = state.kept_after(2)
    torch.testing.assert_close(ours[final], hidden[final], **NEAR)


@ENCODERS
@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.012}, {"prune_mode": "topk", "token_keep_rate": -0.5},
], ids=["threshold", "topk"])  # fmt: skip
def test_masks_are_monotone_and_keep_the_first_token(pruned, batches, architecture, fields):
    model = pruned(architecture, **fields)
    batch = batches(model.config, count=1)[0]
    _, state = run(model, batch)
    before = batch["attention_mask"].bool()
    for block in layers_of(model):
        after = state.kept_after(block.index)
        assert (after <= before).all()
        assert after[:, 0].all()
        assert torch.equal(state.fed[block.index], after.sum(1))
        before = after


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_and_padding_change_nothing(pruned, batches, size):
    model = pruned(final_token_threshold=0.014)
    batch = batches(model.config, count=1)[0]
    together, _ = run(model, batch)
    part = {name: value[:size] for name, value in batch.items()}
    torch.testing.assert_close(run(model, part)[0], together[:size], **NEAR)
    wider = {name: F.pad(value, (0, 9)) for name, value in part.items()}
    torch.testing.assert_close(run(model, wider)[0], together[:size], **NEAR)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(run(model, shuffled)[0], together[order], **NEAR)


def test_worked_example():
    probs = torch.tensor([[[[0.5, 0.3, 0.2, 0], [0.6, 0.2, 0.2, 0], [0.7, 0.2, 0.1, 0], [0.25] * 4]]])
    live = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(token_importance(probs, live, "live"), torch.tensor([[0.6, 0.7 / 3, 0.5 / 3, 0.0]]))
    expected = torch.tensor([[0.0140625, 0.00546875, 0.00390625, 0.0]])
    torch.testing.assert_close(token_importance(probs, live), expected)
    assert float(token_importance(probs, live, "live").sum()) == pytest.approx(1)


def test_ties():
    scores, live = torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.3]]), torch.ones(1, 5, dtype=torch.bool)
    assert keep_above(scores, live, 0.3).tolist() == [[True, True, True, True, True]]
    assert keep_top(scores, live, torch.tensor([3])).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("lengths", [[1, 2], [1, 1], [0, 3]])
def test_everything_prunable(pruned, lengths):
    model = pruned(final_token_threshold=3.0)
    thresholds_of(model).values.data.fill_(1.0)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    logits, state = run(model, {"input_ids": torch.full((2, 4), 5), "attention_mask": mask})
    assert torch.isfinite(logits).all()
    assert state.kept_after(1).sum(1).tolist() == [min(1, length) for length in lengths]


def test_threshold_gradient_by_finite_differences(pruned, batches):
    model = pruned(masking_mode="soft", final_token_threshold=0.01).train()
    batch = {**batches(model.config, count=1, size=4)[0], "labels": torch.tensor([0, 1, 0, 1])}
    thresholds = thresholds_of(model).double()
    theta = thresholds.values

    def objective():
        state = LiveTokens()
        return model(**batch, forward_state=state).loss + 0.1 * regularizer(state)

    objective().backward()
    assert theta.grad[0] == 0
    for layer in (1, 2):
        values = []
        for step in (1e-7, -1e-7):
            with torch.no_grad():
                theta[layer] += step
                values.append(float(objective()))
                theta[layer] -= step
        assert float(theta.grad[layer]) == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-5, abs=1e-7)


def test_regularizer_pushes_thresholds_up_and_ignores_padding(pruned, batches):
    model = pruned(masking_mode="soft", final_token_threshold=0.01).train()
    batch = batches(model.config, count=1)[0]
    gradients = []
    for extra in (0, 11):
        state = LiveTokens()
        model(**{name: F.pad(value, (0, extra)) for name, value in batch.items()}, forward_state=state)
        (gradient,) = torch.autograd.grad(regularizer(state), thresholds_of(model).values)
        gradients.append(gradient)
    assert (gradients[0][1:] < 0).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def test_editing_the_ramp_after_training_changes_nothing(pruned, batches, tmp_path):
    model = pruned(final_token_threshold=0.014)
    model.save_pretrained(tmp_path)
    batch = batches(model.config, count=1)[0]
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, final_token_threshold=0.5, dtype="auto")
    assert_equal_to_rounding(run(other, batch)[0], run(model, batch)[0])


@pytest.mark.parametrize(("fields", "text"), [
    ({"token_keep_rate": 1.1}, "token_keep_rate must be at most 1"),
    ({"final_token_threshold": -1.0}, "final_token_threshold must not be negative"),
    ({"temperature": 0.0}, "temperature must be positive"), ({"score_reference_length": 0}, "score_reference_length"),
    ({"prune_mode": "rising_threshold"}, "prune_mode must be one of"), ({"masking_mode": "mixed"}, "masking_mode"),
    ({"prune_mode": "topk", "masking_mode": "soft"}, "masking_mode must be 'hard' for prune_mode='topk'"),
])  # fmt: skip
def test_wrong_values(fields, text):
    with pytest.raises(ValueError, match=text):
        hc.TokenPruningConfig(**fields)


def test_linear_attention_and_token_pruning_refuse_each_other(model):
    first = hc.compress(model("bert"), hc.LinformerConfig(projected_length=4))
    with pytest.raises(ValueError, match="token_pruning cannot follow linformer: it needs softmax attention"):
        hc.compress(first, hc.TokenPruningConfig())
    second = hc.compress(model("bert"), hc.TokenPruningConfig())
    with pytest.raises(ValueError, match="linformer cannot follow token_pruning: it needs ordinary layers"):
        hc.compress(second, hc.LinformerConfig(projected_length=4))


def test_cost_on_data(pruned, batches):
    model = pruned(final_token_threshold=0.014)
    data = batches(model.config, count=2)
    s, d = 32, 32
    expected = total = 0.0
    for batch in data:
        state = LiveTokens(whole=True)
        with torch.no_grad():
            model(**batch, forward_state=state)
        for layer in range(3):
            for a, f in zip(state.attended[layer].tolist(), state.fed[layer].tolist(), strict=True):
                expected += 4 * s * d * a + 2 * d * a * a + 2 * d * 64 * f
        total += len(batch["input_ids"])
    cost = hc.count_cost(model, data=data)
    assert cost.macs == pytest.approx(expected / total, rel=1e-12)
    dense = hc.count_cost(model, seq_len=24).macs
    assert cost.macs < dense


def test_page_of_surviving_words(model, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(final_token_threshold=0.014))
    trace = trace_tokens(student, tokenizer, "the film was very good <b>")
    assert trace.tokens[0] == "[CLS]"
    assert [row[0] for row in trace.kept] == [True] * 3
    write_token_page(tmp_path / "page.html", [trace])
    page = (tmp_path / "page.html").read_text()
    assert page.count("class=kept") == sum(map(sum, trace.kept))
    assert "<b>" not in page
    with pytest.raises(ValueError, match="model must drop tokens"):
        trace_tokens(model("bert"), tokenizer, "good")


@pytest.fixture(scope="module")
def full_size():
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=99, max_position_embeddings=64)).eval()


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 1.0), (0.4, 0.7659), (0.2, 0.6881)])
@pytest.mark.parametrize("part", ["base_model", "classifier"])
def test_published_relative_macs(full_size, part, rate, expected):
    # RoBERTa-base, 40 tokens, specification 7.3: what the head of a classifier does not read is not counted as saved.
    ids = torch.randint(5, 99, (1, 40))
    dense = copy.deepcopy(full_size.base_model if part == "base_model" else full_size)
    before = hc.count_cost(dense, 40).macs
    pruned = hc.compress(dense, hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=rate))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert hc.count_cost(pruned, data=data).macs / before == pytest.approx(expected, abs=5e-5)
