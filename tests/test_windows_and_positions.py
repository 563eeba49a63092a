"""Arithmetic of attention in windows, and the position tables of models that count from another row."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model, ModernBertConfig, ModernBertModel
from transformers.masking_utils import create_bidirectional_sliding_window_mask

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.positions import extend_positions_, most_tokens, position_offset
from tests.rounding import assert_equal_to_rounding


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6, 20, 64])
def test_pairs_in_a_window_are_counted(model, tokens):
    dense = model("modernbert")
    block = next(b for b in layers_of(dense) if b.attention.sliding_window is not None)
    # Eight tokens are four to each side.
    pairs = sum(abs(i - j) <= 4 for i in range(tokens) for j in range(tokens))
    assert block.attention_macs(tokens) == 2 * pairs * 32
    wide = next(b for b in layers_of(dense) if b.attention.sliding_window is None)
    assert wide.attention_macs(tokens) == 2 * tokens**2 * 32
    # And transformers' own mask lets as many pass.
    dense.config._attn_implementation = "eager"
    states = torch.zeros(1, tokens, 32)
    mask = create_bidirectional_sliding_window_mask(dense.config, states, torch.ones(1, tokens, dtype=torch.int64))
    assert int((mask == 0).sum()) == pairs if mask is not None else pairs == tokens**2


def test_lengths_may_be_averages(model):
    local, wide = (layers_of(model("modernbert"))[index] for index in (1, 0))
    assert local.attention_macs(5.0) < local.attention_macs(5.5) < local.attention_macs(6.0)
    assert wide.attention_macs(5.5) == pytest.approx(2 * 5.5**2 * 32)


def test_budgets_follow_windows():
    """Heads of local layers are cheap on long inputs, so the same share of arithmetic costs other units."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    dense = ModernBertModel(ModernBertConfig(**sizes, **special, num_hidden_layers=3, local_attention=8))
    data = [{"input_ids": torch.randint(3, 99, (4, 256))}]
    before = hc.count_cost(dense, seq_len=256)
    projections = 256 * (4 * 32 * 32 + 3 * 32 * 64)
    local = 2 * 32 * (256 * 9 - 20)
    assert before.macs_by_layer == [projections + 2 * 32 * 256**2, projections + local, projections + local]
    hc.compress(dense, hc.StructuredPruningConfig(mac_ratio=0.6), data=data)
    after = hc.count_cost(dense, seq_len=256)
    assert 0.55 < after.macs / before.macs <= 0.6


def test_opt_has_as_many_tokens_as_its_config_says(model):
    opt = model("opt")
    assert (most_tokens(opt), position_offset(opt)) == (66, 2)
    ids = torch.randint(3, 99, (2, 66))
    with torch.no_grad():
        before = opt(input_ids=ids)[0]
        with pytest.raises(IndexError):
            opt(input_ids=torch.randint(3, 99, (2, 67)))
        extend_positions_(opt, 100 + 2)
        assert_equal_to_rounding(opt(input_ids=ids)[0], before)
        opt(input_ids=torch.randint(3, 99, (2, 100)))
    assert (most_tokens(opt), opt.config.max_position_embeddings) == (100, 100)
    table = opt.decoder.embed_positions.weight
    assert torch.equal(table[68], table[2])
    assert torch.equal(table[101], table[35])


def test_lengthened_opt_reloads(model, tmp_path):
    opt = model("opt")
    extend_positions_(opt, 102)
    opt.save_pretrained(tmp_path)
    again = type(opt).from_pretrained(tmp_path)
    assert torch.equal(again.decoder.embed_positions.weight, opt.decoder.embed_positions.weight)


def test_other_tables(model):
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=99, n_positions=20))
    assert (most_tokens(gpt2), position_offset(gpt2)) == (20, 0)
    assert [most_tokens(model(name)) for name in ("bert", "distilbert", "roberta", "llama", "modernbert")] == [
        66, 66, 64, None, None,
    ]  # fmt: skip
