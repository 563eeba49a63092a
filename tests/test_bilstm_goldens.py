"""The BiLSTM student against numbers that the original ProKT code produced."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hf_compress as hc
from hf_compress.training.losses import output_divergence
from tests.bilstm_models import from_published


TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}


def close(found, expected, precision):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_forward(shared, kind, precision):
    folder = shared / "specs" / "golden" / "prokt" / "bilstm"
    golden = np.load(folder / f"forward_{precision}.npz")
    config = hc.BiLSTMConfig(
        vocab_size=60, embedding_size=20, hidden_size=16, dropout=0.0, num_labels=3, mask_padding=False,
        pair_mode="separate" if kind == "pair" else "joint",
    )  # fmt: skip
    model = hc.BiLSTMForSequenceClassification(config).eval()
    model.load_state_dict(from_published(load_file(folder / "init.safetensors"), config))
    model.to(torch.float32 if precision == "fp32" else torch.float64)
    ids, labels = torch.tensor(golden[f"{kind}/input_ids"]), torch.tensor(golden[f"{kind}/labels"])
    texts = (
        dict(zip(("input_ids", "second_input_ids"), ids.unbind(1), strict=True))
        if kind == "pair"
        else {"input_ids": ids}
    )
    with torch.no_grad():
        outputs = model(**texts, labels=labels, output_hidden_states=True)
        first = model.bilstm(texts["input_ids"])
    close(outputs.logits, golden[f"{kind}/logits"], precision)
    close(outputs.hidden_states[-1][:, :12], golden[f"{kind}/hidden_first_text"], precision)
    close(first.pooler_output, golden[f"{kind}/pooled_first_text"], precision)
    if kind == "pair":
        with torch.no_grad():
            second = model.bilstm(texts["second_input_ids"])
        close(second.pooler_output, golden["pair/pooled_second_text"], precision)
    divergence, entropy = golden[f"{kind}/kld_ce"]
    close(outputs.loss, entropy, precision)
    close(
        output_divergence(torch.tensor(golden[f"{kind}/soft_target_logits"]), outputs.logits, 1.0),
        divergence,
        precision,
    )


def test_untouched_weights_are_all(shared):
    """Only the published pooler, which no code ran, has no place here."""
    published = load_file(shared / "specs" / "golden" / "prokt" / "bilstm" / "init.safetensors")
    config = hc.BiLSTMConfig(vocab_size=60, embedding_size=20, hidden_size=16, num_labels=3, pair_mode="separate")
    ours = from_published(published, config)
    assert len(ours) == len(published) - 2
    assert ours.keys() == hc.BiLSTMForSequenceClassification(config).state_dict().keys()
