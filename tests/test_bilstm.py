"""The BiLSTM student against an LSTM written by hand, and its losses, files and settings."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

import hf_compress as hc
from tests.bilstm_models import bilstm, pair_by_hand, states_by_hand, texts, vector_by_hand
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


LENGTHS = [4, 9, 1, 0, 9, 6]


def holes(ids, mask):
    """The same texts with padding between the tokens, of another id."""
    spread, live = (
        torch.full((len(ids), 2 * ids.shape[1]), 7),
        torch.zeros(len(ids), 2 * ids.shape[1], dtype=torch.int64),
    )
    spread[:, 1::2], live[:, 1::2] = ids, mask
    return spread, live


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_the_formulas(layers, padding):
    model = bilstm(num_layers=layers)
    ids, mask = texts(LENGTHS, padding="left" if padding == "left" else "right")
    if padding == "holes":
        ids, mask = holes(ids, mask)
    outputs = model(ids, mask, output_hidden_states=True)
    assert len(outputs.hidden_states) == layers + 1
    for row in range(len(ids)):
        live = mask[row].bool()
        text = ids[row][live]
        assert_equal_to_rounding(outputs.logits[row], model.classifier(vector_by_hand(model, text)))
        for found, expected in zip(
            outputs.hidden_states[1:], states_by_hand(model, text) if len(text) else (), strict=False
        ):
            assert_equal_to_rounding(found[row][live], expected)
            assert not found[row][~live].any()


def test_a_batch_and_its_single_texts():
    model = bilstm(num_layers=2).float()
    ids, mask = texts(LENGTHS)
    together = model(ids, mask).logits
    for row, length in enumerate(LENGTHS):
        if length:
            assert_equal_to_rounding(together[row], model(ids[row : row + 1, :length]).logits[0])


def test_gradients_reach_live_tokens_only():
    model = bilstm()
    ids, mask = texts([3, 6])
    embedded = model.bilstm.embeddings(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=mask).logits.sum().backward()
    touched = embedded.grad.abs().sum(-1) > 0
    assert torch.equal(touched, mask.bool())


def test_published_arithmetic_reads_padding():
    model = bilstm(mask_padding=False)
    ids, mask = texts([3, 7])
    logits = model(ids, mask).logits
    for row in range(2):
        assert_equal_to_rounding(logits[row], model.classifier(vector_by_hand(model, ids[row])))
    assert differ_beyond_rounding(logits[:1], model(ids[:1, :3]).logits)


def test_pairs_read_separately():
    model = bilstm(pair_mode="separate", num_labels=3)
    (first, first_mask), (second, second_mask) = texts([4, 2, 7, 0]), texts([3, 9, 1, 5], seed=2)
    logits = model(first, first_mask, second_input_ids=second, second_attention_mask=second_mask).logits
    for row in range(4):
        expected = pair_by_hand(model, first[row][first_mask[row].bool()], second[row][second_mask[row].bool()])
        assert_equal_to_rounding(logits[row], expected)


def test_token_types_tell_the_texts_apart():
    model = bilstm(pair_mode="separate")
    ids = torch.tensor([[2, 11, 12, 3, 21, 3, 0, 0], [2, 13, 3, 22, 23, 24, 25, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    logits = model(ids, attention_mask=(ids != 0).long(), token_type_ids=types).logits
    pairs = [([2, 11, 12, 3], [2, 21, 3]), ([2, 13, 3], [2, 22, 23, 24, 25, 3])]
    for row, (first, second) in enumerate(pairs):
        assert_equal_to_rounding(logits[row], pair_by_hand(model, torch.tensor(first), torch.tensor(second)))


@pytest.mark.parametrize(
    ("options", "labels", "loss"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]), lambda z, y: F.mse_loss(z.squeeze(-1), y)),
        ({"num_labels": 3}, torch.tensor([2, 0]), F.cross_entropy),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_losses(options, labels, loss):
    model = bilstm(**options)
    ids, mask = texts([3, 5])
    labels = labels.double() if labels.is_floating_point() else labels
    outputs = model(ids, mask, labels=labels)
    assert_equal_to_rounding(outputs.loss, loss(outputs.logits, labels))
    assert_equal_to_rounding(model(ids[:1], mask[:1], labels=labels[:1]).loss, loss(outputs.logits[:1], labels[:1]))


RELOAD = """
import sys, torch
import hf_compress
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
batch = torch.load(sys.argv[2])
torch.save({"logits": model(**batch).logits.detach(), "state": model.state_dict()}, sys.argv[3])
"""


@pytest.mark.parametrize("mode", [pytest.param("joint", marks=pytest.mark.slow), "separate"])
def test_reload_in_another_process(tmp_path, mode):
    model = bilstm(pair_mode=mode, num_labels=3, num_layers=2).float()
    batch = dict(zip(("input_ids", "attention_mask"), texts([3, 5]), strict=True))
    if mode == "separate":
        batch.update(zip(("second_input_ids", "second_attention_mask"), texts([4, 2]), strict=True))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    torch.save(batch, tmp_path / "batch")
    command = [sys.executable, "-c", RELOAD, str(tmp_path), str(tmp_path / "batch"), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found")
    state = model.state_dict()
    assert found["state"].keys() == state.keys()
    assert all(torch.equal(found["state"][name], value) for name, value in state.items())
    assert_equal_to_rounding(found["logits"], model(**batch).logits)


def test_auto_classes_know_it(tmp_path):
    config = AutoConfig.for_model("bilstm", vocab_size=9, hidden_size=3, embedding_size=4)
    assert type(config) is hc.BiLSTMConfig
    assert type(AutoModelForSequenceClassification.from_config(config)) is hc.BiLSTMForSequenceClassification
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[4, 5, 6]])
    assert_equal_to_rounding(model.classifier(base(ids).pooler_output), model(ids).logits)


def test_new_weights_are_drawn_as_documented():
    torch.manual_seed(0)
    config = hc.BiLSTMConfig(vocab_size=2000, embedding_size=50, hidden_size=25)
    model = hc.BiLSTMForSequenceClassification(config)
    table, lstm = model.bilstm.embeddings.weight, model.bilstm.layers[0].weight_hh_l0
    assert table.std().item() == pytest.approx(0.02, rel=0.02)
    assert not table[0].any()
    assert 0.95 * 25**-0.5 < lstm.abs().max() <= 25**-0.5
    assert lstm.std().item() == pytest.approx((25 * 3) ** -0.5, rel=0.05)
    config.mask_padding = False
    assert hc.BiLSTMForSequenceClassification(config).bilstm.embeddings.weight[0].any()


def test_published_size():
    model = hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(num_labels=3, pair_mode="separate"))
    assert sum(p.numel() for p in model.parameters()) == 9_156_600 + 1_444_800 + 1_440_600 + 1_803


@pytest.mark.parametrize("mode", ["joint", "separate"])
def test_pipeline(tmp_path, tokenizer, mode):
    config = hc.BiLSTMConfig.for_tokenizer(
        tokenizer, embedding_size=6, hidden_size=5, pair_mode=mode, id2label={0: "no", 1: "yes"}
    )
    torch.manual_seed(0)
    model = hc.BiLSTMForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    marked = copy.deepcopy(tokenizer)
    if mode == "separate":
        hc.read_pairs_separately_(marked)
    marked.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    given = {"text": "good bad bad", "text_pair": "bad good"}
    if mode == "joint":
        batch = tokenizer(given["text"], given["text_pair"], return_tensors="pt")
        logits = model(**batch).logits
    else:
        first, second = (tokenizer(text, return_tensors="pt").input_ids for text in given.values())
        logits = model(first, second_input_ids=second).logits
    found = classify(given)
    found = found[0] if isinstance(found, list) else found
    expected = logits.softmax(-1)[0]
    assert found["label"] == ("no", "yes")[int(expected.argmax())]
    assert found["score"] == pytest.approx(expected.max().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number above 0, got 0"),
        ({"num_layers": 1.5}, "num_layers must be a whole number above 0, got 1.5"),
        ({"dropout": 1.0}, "dropout must be in 0..1, 1 excluded, got 1.0"),
        ({"pair_mode": "both"}, "pair_mode must be one of joint, separate, got 'both'"),
        ({"mask_padding": 1}, "mask_padding must be true or false, got 1"),
        ({"vocab_size": 5, "pad_token_id": 5}, "pad_token_id must be one of the 5 tokens"),
    ],
)
def test_wrong_settings(options, text):
    with pytest.raises(ValueError, match=text):
        hc.BiLSTMConfig(**options)


def test_wrong_inputs():
    ids, mask = texts([3, 2])
    with pytest.raises(ValueError, match="input_ids must be below vocab_size 40, got 40: the tokenizer has another"):
        bilstm()(ids.clamp(min=40))
    with pytest.raises(ValueError, match="second_input_ids must be left out with pair_mode='joint'"):
        bilstm()(ids, second_input_ids=ids)
    separate = bilstm(pair_mode="separate")
    with pytest.raises(ValueError, match="second_input_ids must be given with pair_mode='separate'"):
        separate(ids, mask)
    with pytest.raises(ValueError, match="Each row must hold two texts"):
        separate(ids, mask, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="Exactly one of input_ids and inputs_embeds"):
        bilstm()(attention_mask=mask)
