"""What settings of token pruning mean after a model was made: edited fields, precision, settings without effect."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.methods.token_pruning.training import regularizer


HEAD = "sequence_classification"


def six_layers():
    """Top-k leaves the first three layers alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=6, max_position_embeddings=66))


def kept(model, batch):
    state = LiveTokens()
    with torch.no_grad():
        model.eval()(**batch, forward_state=state)
    return [int(state.kept_after(block.index).sum()) for block in layers_of(model)[:-1]]


def test_an_edited_keep_rate_counts_in_the_next_forward_pass(batches):
    edited = hc.compress(six_layers(), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.9))
    batch = batches(edited.config, count=1)[0]
    before = kept(edited, batch)
    edited.config.token_keep_rate = 0.2
    after = kept(edited, batch)
    fresh = hc.compress(six_layers(), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.2))
    assert after == kept(fresh, batch) != before
    edited.config.token_keep_rate = 1.0
    assert len(set(kept(edited, batch))) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_thresholds_reload_in_the_precision_they_had(model, tmp_path, dtype):
    """Double in a model of double precision, else single: half precision cannot tell scores near 1/128 apart."""
    pruned = hc.compress(model("bert", HEAD).to(dtype), hc.TokenPruningConfig())
    values = thresholds_of(pruned).values
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        values += 1e-10
    pruned.save_pretrained(tmp_path)
    again = thresholds_of(AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto"))
    assert again.values.dtype == values.dtype
    assert torch.equal(again.values, values)
    assert again.weight.dtype == again.integral.dtype == values.dtype
    # Whoever asks for single precision gets it.
    assert (
        thresholds_of(AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)).values.dtype
        == torch.float32
    )


@pytest.mark.parametrize("fields", [{"score_norm": "live"}, {"score_norm": "initial"}, {"scoring_mode": "mean_norm"}])
def test_a_length_that_no_score_refers_to_is_refused(model, fields):
    config = hc.TokenPruningConfig(score_reference_length=64, **fields)
    dense = model("bert", HEAD)
    with pytest.raises(ValueError, match="score_reference_length=64 has no effect"):
        hc.compress(dense, config)
    assert not hc.steps_of(dense)


def test_topk_cannot_become_thresholds_by_an_edit(model, batches):
    edited = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.5))
    edited.config.prune_mode = "absolute_threshold"
    with pytest.raises(ValueError, match="was made with prune_mode='topk'"):
        edited(**batches(edited.config, count=1)[0])


def test_compat_stands_in_the_record_and_comes_back(model, batches, tmp_path):
    config = hc.TokenPruningConfig(final_token_threshold=0.4, compat="ltp", score_norm="live")
    published = hc.compress(model("bert", HEAD), config).eval()
    batch = batches(published.config, count=1)[0]
    published.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert hc.steps_of(again) == hc.steps_of(published)
    assert hc.steps_of(again)[0]["compat"] == "ltp"
    counts = kept(published, batch)
    assert kept(again, batch) == counts
    # No token is spared, the first one neither; heads read it all the same.
    assert counts[-1] == 0
    with torch.no_grad():
        assert torch.isfinite(again(**batch).logits).all()
        torch.testing.assert_close(again(**batch).logits, published(**batch).logits)


def test_the_published_regulariser_counts_padding_up_to_the_reference_length(model, batches):
    """Padding a batch further changes nothing; each example counts as one of 128 tokens."""
    fields = {"masking_mode": "soft", "temperature": 1e-2}
    models = {
        compat: hc.compress(model("bert", HEAD).double(), hc.TokenPruningConfig(compat=compat, **fields)).train()
        for compat in (None, "ltp")
    }
    batch = batches(models[None].config, count=1)[0]
    longer = {
        name: torch.nn.functional.pad(value, (0, 5)) if value.ndim == 2 else value for name, value in batch.items()
    }
    terms = {}
    for compat, pruned in models.items():
        found = []
        for inputs in (batch, longer):
            state = LiveTokens()
            pruned(**inputs, forward_state=state)
            found.append(regularizer(state))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
        terms[compat] = state.soft
    # The first layer that prunes: behind it, the first token has been multiplied by its mask or not.
    layer = min(terms["ltp"])
    (mask, counted), (ours, inside) = terms["ltp"][layer], terms[None][layer]
    assert mask.shape == counted.shape == (len(batch["input_ids"]), 128)
    padding = torch.sigmoid(-thresholds_of(models["ltp"]).values[layer] / 1e-2) * (128 - inside.sum(1))
    torch.testing.assert_close(mask.sum(1), (ours * inside)[:, 1:].sum(1) + mask[:, 0] + padding)
