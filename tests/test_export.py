"""`torch.export`: what can be recorded computes the same, what cannot says so. ONNX: `test_export_onnx.py`."""

import pytest
import torch

import hf_compress as hc
from hf_compress.core.forward_state import FORWARD_STATE, forward_state
from tests.conftest import ARCHITECTURES, HEADS
from tests.contract.conftest import METHOD_CONFIGS, logits_of
from tests.rounding import assert_equal_to_rounding


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


def _batches_with_gaps(batches, config):
    """Batches of three sizes; in the last one an example has no tokens, and another has its first token only."""
    found = [
        batches(config, count=1, size=size, length=length, seed=9)[0] for size, length in ((3, 11), (1, 7), (5, 24))
    ]
    found[-1]["attention_mask"][2] = 0
    found[-1]["attention_mask"][3, 1:] = 0
    return found


@needs_export
@pytest.mark.parametrize(
    ("architecture", "head", "settings"),
    [
        ("bert", HEAD, {"final_token_threshold": 0.15, "score_norm": "live"}),
        ("distilbert", "base", {"prune_mode": "topk", "token_keep_rate": -0.5}),
        pytest.param("bert", "base", {"final_token_threshold": 0.012}, marks=pytest.mark.slow),
        pytest.param("electra", HEAD, {"prune_mode": "topk", "token_keep_rate": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_dropped_tokens_are_exported(batches, architecture, head, settings):
    """The recorded pass keeps positions of equal number; the eager one packs rows: two routes to the same outputs."""
    config = ARCHITECTURES[architecture]()
    # Top-k leaves the first three layers alone.
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    pruned = hc.compress(HEADS[head].from_config(config).eval(), hc.TokenPruningConfig(**settings))
    first, *others = _batches_with_gaps(batches, config)
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in first}
    with torch.no_grad():
        graph = torch.export.export(pruned, (), dict(first), dynamic_shapes=axes).module()
        dropped = 0
        for batch in (first, *others):
            state = forward_state(pruned)
            pruned(**batch, **state)
            dropped += int(batch["attention_mask"].sum() - state[FORWARD_STATE].kept_after(3).sum())
            assert_equal_to_rounding(graph(**batch).to_tuple()[0], pruned(**batch).to_tuple()[0])
    assert dropped > 20


@needs_export
def test_the_released_code_is_not_exported(model, batches):
    pruned = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(compat="ltp"))
    (batch,) = batches(pruned.config, count=1)
    with pytest.raises(ValueError, match="not with compat='ltp', which may drop the first token"), torch.no_grad():
        torch.export.export(pruned, (), dict(batch))
    # The model itself is as it was.
    assert torch.isfinite(logits_of(pruned, batch)[0]).all()
