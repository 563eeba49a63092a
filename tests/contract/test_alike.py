"""A brief look at architectures that are built like others: what a method makes of them reloads."""

import pytest
import torch
from transformers import AutoModel

import hf_compress as hc
from tests.conftest import ALIKE
from tests.contract.conftest import METHOD_CONFIGS, REFUSED, assert_same_outputs, logits_of
from tests.rounding import differ_beyond_rounding


@pytest.mark.parametrize("architecture", ALIKE)
@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_reloads(model, compressed, batch, method, architecture, tmp_path):
    dense = model(architecture)
    changed = compressed(method, architecture)
    # Of a smaller vocabulary where one was pruned.
    seen = batch(changed)
    assert differ_beyond_rounding(logits_of(changed, seen)[0], logits_of(dense, seen)[0])
    changed.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert hc.steps_of(reloaded) == hc.steps_of(changed)
    assert_same_outputs(reloaded, changed, seen)


@pytest.mark.parametrize("architecture", ALIKE)
def test_padding_changes_nothing_in_linear_attention(compressed, batch, architecture):
    """Grouped queries (EuroBERT) and rotary positions (all): a row alone is the row among others."""
    if ("linformer", architecture) in REFUSED:
        pytest.skip("refused")
    model = compressed("linformer", architecture).double()
    seen = batch(model)
    together = logits_of(model, seen)[0]
    length = int(seen["attention_mask"][1].sum())
    alone = {name: value[1:2, :length] for name, value in seen.items()}
    assert torch.allclose(logits_of(model, alone)[0][0], together[1, :length], rtol=0, atol=1e-10)
