"""Attention in pieces, and the bookkeeping of tokens that stay, against plain loops."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.core.layers import LiveTokens, Packing
from hf_compress.methods.token_pruning import attention


def outputs(model, batch):
    state = LiveTokens()
    found = model(**batch, live_tokens=state, output_hidden_states=True)
    return torch.stack(found.hidden_states).detach(), torch.stack([state.kept[i] for i in sorted(state.packings)])


@pytest.mark.parametrize("limit", [1, 20_000, 2**22], ids=["one example", "some", "all"])
@pytest.mark.parametrize("equal", [False, True], ids=["padding", "equal lengths"])
@pytest.mark.parametrize("prune_mode", ["absolute_threshold", "topk"])
def test_pieces_give_what_gradients_give(batches, monkeypatch, limit, equal, prune_mode):
    """With gradients the weights of the whole batch are built at once, by another function."""
    monkeypatch.setattr(attention, "_WEIGHTS_AT_A_TIME", limit)
    fields = {"token_keep_rate": -1.0} if prune_mode == "topk" else {"final_token_threshold": 0.02}
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(
        vocab_size=1200, hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=48,
        initializer_range=0.4,
    )).double().eval()  # fmt: skip
    pruned = hc.compress(dense, hc.TokenPruningConfig(prune_mode=prune_mode, **fields))
    batch = batches(dense.config, count=1)[0]
    if equal:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
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
    live[:, 0] = True
    packing = Packing.of(live)
    assert torch.equal(packing.live(), live)
    keep = (torch.rand(batch, packing.longest) < (1.0 if seed % 5 == 0 else 0.5)) & (
        torch.arange(packing.longest) < packing.lengths[:, None]
    )
    keep[:, 0] = True
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
    assert torch.equal(first.pack(states), states[torch.arange(batch), live.int().argmax(1)])
    assert first.live().sum(1).tolist() == [1] * batch
