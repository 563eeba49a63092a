"""Calibration with what people have: rows of data sets, lists, images, sounds, encoder-decoders."""

import copy

import datasets
import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

import hf_compress as hc
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.examples import batches_of
from tests.rounding import assert_compressed_alike, assert_equal_to_rounding


HEAD = "sequence_classification"
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def rows():
    """40 examples of different lengths, as a tokenizer's lists."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (40,), generator=generator).tolist()
    ids = [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "label": index % 2, "text": "as it was"} for index, row in enumerate(ids)]


def padded(rows, size=8):
    """The same by hand."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(row["input_ids"]) for row in part)
        ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in part]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in part]
        yield {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([row["label"] for row in part]),
        }


FORMS = {
    "rows": lambda rows: rows,
    "data set": datasets.Dataset.from_list,
    "tensors": lambda rows: [{"input_ids": torch.tensor(r["input_ids"]), "labels": r["label"]} for r in rows],
    "torch format": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "batches of lists": lambda rows: [
        {"input_ids": [r["input_ids"] for r in rows[i : i + 8]], "label": [r["label"] for r in rows[i : i + 8]]}
        for i in range(0, 40, 8)
    ],
    "numpy format": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "one pass": lambda rows: (row for row in rows),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_batches(model, rows, form):
    found = list(batches_of(FORMS[form](rows), model("bert").config))
    for ours, theirs in zip(found, padded(rows), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("config", [
    hc.StructuredPruningConfig(mac_ratio=0.6), hc.StructuredPruningConfig(mac_ratio=0.6, selection="fisher"),
    hc.WeightPruningConfig(target_sparsity=0.5, criterion="snip"),
    hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="sparsegpt", scope="local"),
], ids=["moments", "fisher", "snip", "sparsegpt"])  # fmt: skip
def test_a_data_set_calibrates_as_its_batches_do(model, rows, config):
    whole = hc.compress(model("bert", HEAD), config, data=datasets.Dataset.from_list(rows))
    by_hand = hc.compress(model("bert", HEAD), config, data=list(padded(rows)))
    assert_compressed_alike(whole, by_hand)
    assert hc.count_cost(whole, data=datasets.Dataset.from_list(rows)) == hc.count_cost(
        by_hand, data=list(padded(rows))
    )


def test_what_is_no_input_is_refused_with_a_remedy(model):
    dense, config = model("bert", HEAD), hc.StructuredPruningConfig(mac_ratio=0.6)
    texts = datasets.Dataset.from_dict({"text": ["a film", "a plot"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"got the keys \['label', 'text'\]. Tokenize the texts first"):
        hc.compress(dense, config, data=texts)
    with pytest.raises(ValueError, match="must be an iterable of dicts of tensors, got str in it"):
        hc.compress(dense, config, data=["a film"])
    several = hc.StructuredPruningConfig(mac_ratio=0.6, selection="fisher")
    with pytest.raises(ValueError, match="must be readable .* times for these settings, got a one-shot generator"):
        hc.compress(dense, several, data=({"input_ids": [1, 2], "label": 0} for _ in range(4)))


def _vit():
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)), {
        "pixel_values": torch.randn(4, 3, 16, 16),
        "labels": torch.tensor([0, 1, 0, 1]),
    }


def _wav2vec2(**changes):
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**SIZES, **convolutions, **positions, **changes)
    return Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(4, 400)}


def _t5():
    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=0)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[:, 7:] = 0
    batch = {
        "input_ids": torch.randint(3, 99, (4, 12)),
        "attention_mask": mask,
        "labels": torch.randint(3, 99, (4, 5)),
    }
    return T5ForConditionalGeneration(config), batch


def _deberta():
    relative = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**SIZES, **relative, vocab_size=99)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[:, 7:] = 0
    batch = {"input_ids": torch.randint(3, 99, (3, 12)), "attention_mask": mask}
    return DebertaV2ForSequenceClassification(config), batch


OTHERS = {"ViT": _vit, "Wav2Vec2": _wav2vec2, "T5": _t5, "DeBERTa": _deberta}


@pytest.mark.parametrize("kind", list(OTHERS))
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_other_inputs_than_tokens(kind, criterion):
    torch.manual_seed(0)
    dense, batch = OTHERS[kind]()
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion=criterion, scope="local")
    hc.compress(dense, config, data=[batch, batch])
    assert hc.steps_of(dense)[0]["achieved_sparsity"] == 0.5


def test_rows_of_images():
    torch.manual_seed(0)
    dense, batch = _vit()
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="wanda")
    rows = [{"pixel_values": image} for image in batch["pixel_values"]]
    lists = datasets.Dataset.from_list([{"pixel_values": image.tolist()} for image in batch["pixel_values"]])
    found = [hc.compress(copy.deepcopy(dense), config, data=data) for data in ([batch], rows, lists)]
    for other in found[1:]:
        assert_compressed_alike(other, found[0])


def _sounds():
    """Six sounds of different lengths, as a feature extractor's arrays."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=generator).numpy() for length in (400, 260, 31, 400, 123, 60)]


def test_rows_of_sounds():
    rows = [{"input_values": sound, "label": 1, "audio": {"path": "a.wav"}} for sound in _sounds()]
    (found,) = batches_of(rows, Wav2Vec2Config(), "input_values")
    assert set(found) == {"input_values", "attention_mask", "labels"}
    for sound, values, mask in zip(_sounds(), found["input_values"], found["attention_mask"], strict=True):
        assert torch.equal(values[: len(sound)], torch.from_numpy(sound))
        assert not values[len(sound) :].any()
        assert mask.tolist() == [1] * len(sound) + [0] * (400 - len(sound))
    lists = [{"input_values": sound.tolist(), "label": 1} for sound in _sounds()]
    (again,) = batches_of(lists, Wav2Vec2Config(), "input_values")
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("stable", [False, True], ids=["post-norm", "stable"])
def test_padding_of_sounds_does_not_count(stable):
    """The mask is of samples, layers see frames: a padded batch gives each layer the rows of the sounds alone."""
    torch.manual_seed(0)
    # Group norms over time would mix padding into real frames, in the model itself.
    dense = _wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=stable)[0].double()
    modules = {name: module for name, module in dense.named_modules() if "layers." in name}
    modules = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    assert len(modules) == 12
    whole, alone = ({name: Rows() for name in modules} for _ in range(2))
    (batch,) = batches_of([{"input_values": sound} for sound in _sounds()], dense.config, "input_values")
    collect_inputs(dense, modules, whole, [batch])
    singles = [{"input_values": torch.from_numpy(sound)[None]} for sound in _sounds()]
    collect_inputs(dense, modules, alone, singles)
    # (L - 10) // 5 + 1, then (L - 3) // 2 + 1.
    assert [len(rows) for rows in alone["wav2vec2.encoder.layers.0.attention.q_proj"].seen] == [39, 25, 2, 39, 11, 5]
    for name in modules:
        assert_equal_to_rounding(torch.cat(whole[name].seen), torch.cat(alone[name].seen))


def test_sounds_and_images_take_the_models_dtype():
    for make, main in ((_vit, "pixel_values"), (_wav2vec2, "input_values")):
        dense, batch = make()
        config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="wanda")
        hc.compress(dense.bfloat16(), config, data=[{main: batch[main]}])
        assert hc.steps_of(dense)[0]["achieved_sparsity"] == 0.5


class Rows:
    def __init__(self):
        self.seen = []

    def update(self, rows):
        self.seen.append(rows.clone())


def test_each_layer_of_an_encoder_decoder_has_its_own_padding():
    torch.manual_seed(0)
    dense, batch = _t5()
    names = ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q",
             "decoder.block.1.layer.1.EncDecAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"]  # fmt: skip
    rows = {name: Rows() for name in names}
    collect_inputs(dense, {name: dense.get_submodule(name) for name in names}, rows, [batch], whole=True)
    # Seven of twelve tokens in, all five out.
    assert [len(rows[name].seen[0]) for name in names] == [4 * 7, 4 * 5, 4 * 5, 4 * 7]
    same = {**batch, "labels": torch.randint(3, 99, (4, 12))}
    with pytest.raises(ValueError, match="cannot tell whose padding encoder.* sees: .* Pad them to different lengths"):
        collect_inputs(dense, {name: dense.get_submodule(name) for name in names}, rows, [same], whole=True)
    # Without padding nothing is in doubt.
    unpadded = {**same, "attention_mask": torch.ones_like(same["attention_mask"])}
    collect_inputs(dense, {name: dense.get_submodule(name) for name in names}, rows, [unpadded], whole=True)
    assert {len(rows[name].seen[-1]) for name in names} == {48}


def test_missing_main_inputs_are_named():
    dense, batch = _vit()
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="wanda")
    with pytest.raises(ValueError, match=r"data must hold dicts with pixel_values, got the keys \['labels'\]"):
        hc.compress(dense, config, data=[{"labels": batch["labels"]}])


def test_raw_examples_are_refused_with_what_prepares_them():
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="wanda")
    for make, raw, remedy in (
        (_vit, {"image": object(), "label": 1}, "with pixel_values, .* image processor first: dataset.map"),
        (_wav2vec2, {"audio": {"array": [0.0]}, "label": 1}, "with input_values, .* feature extractor first"),
    ):
        with pytest.raises(ValueError, match=remedy):
            hc.compress(make()[0], config, data=[raw])


def test_images_of_different_sizes_are_refused():
    dense, _ = _vit()
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="wanda")
    rows = [{"pixel_values": torch.randn(3, size, size)} for size in (16, 24)]
    with pytest.raises(ValueError, match=r"pixel_values of different shapes, \[3, 16, 16\] and \[3, 24, 24\]"):
        hc.compress(dense, config, data=rows)


def test_models_without_linear_layers_say_what_they_have():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=1))
    magnitude = {"pattern": "1x1", "target_sparsity": 0.5, "criterion": "magnitude"}
    with pytest.raises(
        ValueError, match="must select a layer of Linear .*also holds weights in modules of Conv1D"
    ) as e:
        hc.compress(copy.deepcopy(gpt2), hc.WeightPruningConfig(**magnitude))
    assert "None" not in str(e.value)
    hc.compress(gpt2, hc.WeightPruningConfig(**magnitude, pruning_op_types=["Conv1D"]))
    with pytest.raises(ValueError, match=r"op_names=\['nothing'\], excluded_op_names=\['x'\] must select a layer"):
        hc.compress(gpt2, hc.WeightPruningConfig(**magnitude, op_names=["nothing"], excluded_op_names=["x"]))
