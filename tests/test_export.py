"""`torch.export`: what can be recorded computes the same, what cannot says so."""

import pytest
import torch

import hf_compress as hc
from tests.contract.conftest import METHOD_CONFIGS, logits_of


HEAD = "sequence_classification"
needs_export = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell")


@needs_export
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_linear_attention_is_exported(model, batches, architecture):
    linear = hc.compress(model(architecture, HEAD), METHOD_CONFIGS["linformer"]())
    first, second = batches(linear.config, count=2)
    with torch.no_grad():
        exported = torch.export.export(linear, (), dict(first)).module()
        for batch in (first, second):
            torch.testing.assert_close(exported(**batch).logits, logits_of(linear, batch)[0], rtol=0, atol=1e-5)


@needs_export
def test_token_pruning_says_why_not(model, batches):
    pruned = hc.compress(model("bert", HEAD), METHOD_CONFIGS["token_pruning"]())
    (batch,) = batches(pruned.config, count=1)
    with pytest.raises(ValueError, match="torch.export cannot record a model that drops tokens"), torch.no_grad():
        torch.export.export(pruned, (), dict(batch))
    # The model itself is as it was.
    assert torch.isfinite(logits_of(pruned, batch)[0]).all()
