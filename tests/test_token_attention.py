"""Attention in pieces, and the bookkeeping of tokens that stay, against plain loops."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ElectraConfig,
    ElectraForMultipleChoice,
)

import hf_compress as hc
from hf_compress.methods.token_pruning import attention, importance
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.packing import Packing


def outputs(model, batch):
    state = LiveTokens()
    found = model(**batch, forward_state=state, output_hidden_states=True)
    return torch.stack(found.hidden_states).detach(), torch.stack(
        [state.kept_after(i) for i in sorted(state.packings)]
    )


@pytest.mark.parametrize("limit", [1, 20_000, 2**22], ids=["one example", "some", "all"])
@pytest.mark.parametrize("equal", [False, True], ids=["padding", "equal lengths"])
@pytest.mark.parametrize("prune_mode", ["absolute_threshold", "topk"])
def test_pieces_give_what_gradients_give(batches, monkeypatch, limit, equal, prune_mode):
    """With gradients the weights of the whole batch are built at once, by another function."""
    monkeypatch.setattr(attention, "_WEIGHTS_AT_A_TIME", limit)
    fields = {"token_keep_rate": -1.0} if prune_mode == "topk" else {"final_token_threshold": 0.02}
    # A classifier would not have the padding on the left.
    dense = tiny(length=64, kind=BertForTokenClassification)
    pruned = hc.compress(dense, hc.TokenPruningConfig(prune_mode=prune_mode, **fields))
    batch = batches(dense.config, count=1)[0]
    if equal:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    else:
        batch["attention_mask"][0] = batch["attention_mask"][0].flip(0)  # padding on the left ...
        batch["attention_mask"][1, 3:6] = 0  # ... and in between
    with torch.enable_grad():
        expected, expected_kept = outputs(pruned, batch)
    with torch.no_grad():
        found, kept = outputs(pruned, batch)
    assert torch.equal(kept, expected_kept)
    live = torch.stack([batch["attention_mask"].bool()] * len(found))
    torch.testing.assert_close(found[live], expected[live], rtol=0, atol=1e-12)
    assert not kept[-2].equal(kept[0]), "nothing was pruned, so nothing was compared"


@pytest.mark.parametrize("seed", range(20))
def test_what_remains_is_what_a_loop_finds(seed):
    torch.manual_seed(seed)
    batch, width = 1 + seed % 4, 7
    live = torch.rand(batch, width) < (1.0 if seed % 3 == 0 else 0.7)
    live[0, seed % width] = True
    if seed % 4 > 1:
        live[seed % 2 :: 2] = False
        live[(seed + 1) % 2, 3] = True
    packing = Packing.of(live)
    assert torch.equal(packing.live(), live)
    keep = (torch.rand(batch, packing.longest) < (1.0 if seed % 5 == 0 else 0.5)) & (
        torch.arange(packing.longest) < packing.lengths[:, None]
    )
    keep[:, 0] = packing.lengths > 0
    left, chosen = packing.only(keep)

    states = torch.randn(batch, width, 3)
    remaining, expected = torch.zeros_like(live), []
    for i in range(batch):
        places = [j for j in range(width) if live[i, j]]
        stays = [j for rank, j in enumerate(places) if keep[i, rank]]
        remaining[i, stays] = True
        expected += [states[i, j] for j in stays]
    assert torch.equal(left.live(), remaining)
    assert left.lengths.tolist() == remaining.sum(1).tolist()
    assert left.longest == int(remaining.sum(1).max())
    rows = packing.pack(states)
    rows = rows if chosen is None else rows[chosen]
    assert torch.equal(rows, torch.stack(expected))
    assert torch.equal(left.pack(states), rows)
    aligned = left.align(rows)
    for i in range(batch):
        assert torch.equal(aligned[i, : left.lengths[i]], states[i, remaining[i]])
    assert torch.equal(left.unalign(aligned), rows)
    first = left.first()
    expected = torch.zeros_like(live)
    for i in range(batch):
        expected[i, min((j for j in range(width) if live[i, j]), default=0)] = True
    assert torch.equal(first.live(), expected)
    assert torch.equal(first.pack(states), states[expected])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_padding_on_the_left_of_a_classifier_is_refused(training):
    """It reads position 0, where a row of padding never changes."""
    model = hc.compress(tiny(), hc.TokenPruningConfig(final_token_threshold=0.02)).train(training)
    ids, mask = torch.randint(5, 1200, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="must have padding on the right for a classifier that reads the first token"):
        model(input_ids=ids, attention_mask=mask)
    # Within a text, and in a text without tokens, it is no harm.
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 3:5], mask[2] = 0, 0
    assert torch.isfinite(model(input_ids=ids, attention_mask=mask).logits).all()
    state = LiveTokens()
    reader = hc.compress(tiny(kind=BertForTokenClassification), hc.TokenPruningConfig())
    reader(input_ids=ids, attention_mask=mask.flip(1), forward_state=state)
    assert torch.equal(state.packings[0].live(), mask.flip(1).bool())


@pytest.mark.parametrize("fields", [{"masking_mode": "soft"}, {}, {"prune_mode": "topk", "token_keep_rate": 0.1}])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
def test_a_batch_of_padding_alone(fields, training, kind):
    model = hc.compress(tiny(kind=kind), hc.TokenPruningConfig(**fields)).train(training)
    state = LiveTokens()
    inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}
    assert torch.isfinite(model(**inputs, forward_state=state).logits).all()
    assert [lengths.tolist() for lengths in state.fed.values()] == [[0, 0]] * 5
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


class TinyMeanForSequenceClassification(BertForTokenClassification):
    """As somebody may write it: a known kind of name, but the head reads all tokens."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits.mean(1)
        return outputs


def electra(summary_type):
    torch.manual_seed(0)
    return ElectraForMultipleChoice(ElectraConfig(
        vocab_size=1200, embedding_size=16, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=16, initializer_range=0.4, summary_type=summary_type,
    )).double().eval()  # fmt: skip


@pytest.mark.parametrize("make", [
    lambda: tiny(kind=TinyMeanForSequenceClassification), lambda: electra("mean"), lambda: electra("last"),
    lambda: electra("first"), lambda: tiny(),
], ids=["own head", "mean", "last", "first", "stock"])  # fmt: skip
def test_heads_find_the_rows_that_they_read(make):
    """The last layer computes the first token alone only where nothing else is read."""
    dense = make()
    shape = (2, 3, 8) if isinstance(dense, ElectraForMultipleChoice) else (2, 8)
    batch = {"input_ids": torch.randint(5, 1200, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    with torch.no_grad():
        expected = dense(**batch).logits
        found = hc.compress(dense, hc.TokenPruningConfig(final_token_threshold=0.0))(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def tiny(length=16, heads=3, kind=BertForSequenceClassification):
    torch.manual_seed(0)
    return kind(BertConfig(
        vocab_size=1200, hidden_size=8 * heads, num_hidden_layers=5, num_attention_heads=heads, intermediate_size=48,
        max_position_embeddings=length, initializer_range=0.4,
    )).double().eval()  # fmt: skip


@pytest.mark.parametrize("lengths", [[3, 0], [0, 3], [3, 0, 2], [3, 0, 3], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("limit", [1, 2**22])
def test_an_example_without_tokens_changes_no_other(monkeypatch, lengths, limit):
    monkeypatch.setattr(attention, "_WEIGHTS_AT_A_TIME", limit)
    model = hc.compress(tiny(), hc.TokenPruningConfig(final_token_threshold=0.02))
    ids = torch.randint(5, 1200, (len(lengths), 8))
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        for i, length in enumerate(lengths):
            if length:
                alone = model(input_ids=ids[i : i + 1, :length]).logits[0]
                torch.testing.assert_close(found[i], alone, rtol=0, atol=1e-10)
    assert torch.isfinite(found).all()


def test_scores_are_single_precision_under_autocast():
    weights, live = torch.rand(2, 3, 6, 6), torch.arange(6) < torch.tensor([[6], [4]])
    expected = importance.received_attention(weights.double(), live)
    with torch.autocast("cpu", torch.bfloat16):
        found = importance.received_attention(weights, live)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
