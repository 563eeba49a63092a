"""Teachers and pruning in training for models that read images or sounds."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AutoModel,
    DeiTConfig,
    HubertConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.examples import batches_of
from hf_compress.core.projections import Role
from hf_compress.training.losses import hidden_distance, output_divergence
from tests import images_and_sounds
from tests.rounding import assert_equal_to_rounding


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def vit(seed, **changes):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**{**SIZES, **changes}, image_size=16, patch_size=8, num_labels=2))


def wav2vec2(seed, kind=Wav2Vec2ForSequenceClassification, **changes):
    torch.manual_seed(seed)
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    quiet = {**dict.fromkeys(dropouts, 0.0), "layerdrop": 0.0, "mask_time_prob": 0.0}
    return kind(Wav2Vec2Config(**{**SIZES, **changes}, **convolutions, **positions, **quiet, vocab_size=12))


def images():
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(pixels)]


def sounds(labels=None):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 401, (16,), generator=generator).tolist()
    rows = [torch.randn(length, generator=generator) for length in lengths]
    return [{"input_values": row, "labels": labels or index % 2} for index, row in enumerate(rows)]


class Collator:
    """Batches as a person's collator makes them: padded, with a mask of samples."""

    def __init__(self, model, main):
        self.config, self.main = model.config, main

    def __call__(self, rows):
        (batch,) = batches_of(rows, self.config, self.main)
        return batch


KINDS = {"ViT": (vit, images, "pixel_values"), "Wav2Vec2": (wav2vec2, sounds, "input_values")}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def arguments(folder, kind=TrainingArguments, **changes):
    plain = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, "max_steps": 6}
    return kind(str(folder), **{**plain, "remove_unused_columns": False, **changes})


@every_kind
def test_terms_are_those_of_each_example_alone(kind, tmp_path):
    """Of a padded batch of sounds, too, whose mask is of samples while hidden states are of frames."""
    make, rows_of, main = KINDS[kind]
    student, teacher, rows = make(0).double(), make(1).double(), rows_of()
    rows = [{**row, main: row[main].double()} for row in rows[:8]]
    args = arguments(tmp_path, hc.DistillationArguments, alpha_layer=1.0, max_steps=1)
    trainer = hc.DistillationTrainer(student, teacher, args, train_dataset=rows, data_collator=Collator(student, main))
    found = trainer.compute_loss(student.train(), trainer._prepare_inputs(trainer.data_collator(rows)))
    terms = []
    for row in rows:
        alone = {main: row[main][None], "labels": torch.tensor([row["labels"]]), "output_hidden_states": True}
        with torch.no_grad():
            ours, theirs = student(**alone), teacher.eval()(**alone)
        distances = [
            hidden_distance(t, s) for s, t in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        ]
        terms.append(ours.loss + output_divergence(theirs.logits, ours.logits, 2.0) + torch.stack(distances).mean())
    torch.testing.assert_close(found.detach(), torch.stack(terms).mean(), rtol=1e-9, atol=0)


def test_outputs_of_each_frame(tmp_path):
    """A CTC model has logits for each frame and labels for each letter: what is compared are the real frames."""
    student, teacher = (wav2vec2(seed, Wav2Vec2ForCTC).double() for seed in (0, 1))
    rows = [{**row, "input_values": row["input_values"].double()} for row in sounds()[:8]]
    collator = Collator(student, "input_values")
    frames = (max(len(row["input_values"]) for row in rows) - 10) // 5 + 1
    # As many letters as frames.
    rows = [{**row, "labels": [3] + [-100] * ((frames - 3) // 2)} for row in rows]
    args = arguments(tmp_path, hc.DistillationArguments, alpha_task=0.0, max_steps=1)
    trainer = hc.DistillationTrainer(student, teacher, args, train_dataset=rows, data_collator=collator)
    batch = collator(rows)
    found = trainer.compute_loss(student.train(), batch)
    terms = []
    for row in rows:
        with torch.no_grad():
            ours, theirs = (model.eval()(row["input_values"][None]).logits for model in (student, teacher))
        terms.append(output_divergence(theirs, ours, 2.0))
    assert batch["labels"].shape[1] == student(batch["input_values"]).logits.shape[1]
    torch.testing.assert_close(found.detach(), torch.stack(terms).mean(), rtol=1e-9, atol=0)


@every_kind
def test_a_student_learns_from_its_teacher(kind, tmp_path):
    make, rows_of, main = KINDS[kind]
    teacher, student, rows = make(1), make(0, num_hidden_layers=1), rows_of()
    args = arguments(tmp_path, hc.DistillationArguments, max_steps=30, alpha_layer=1.0, alpha_task=0.0)
    trainer = hc.DistillationTrainer(student, teacher, args, train_dataset=rows, data_collator=Collator(student, main))
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.5 * before


@every_kind
def test_weights_are_pruned_in_a_stock_training(kind, tmp_path):
    make, rows_of, main = KINDS[kind]
    model, rows = make(0), rows_of()
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_frequency=2, end_step=4)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=Collator(model, main),
        callbacks=[hc.WeightPruningCallback(config)],
    )
    trainer.train()
    trainer.save_model()
    reopened = type(model).from_pretrained(tmp_path)
    assert hc.steps_of(reopened)[0]["achieved_sparsity"] == 0.5
    pruned = [m for n, m in reopened.named_modules() if "layer" in n and isinstance(m, torch.nn.Linear)]
    assert len(pruned) == 12
    for module in pruned:
        assert (module.weight.view(-1, 4) == 0).sum(1).eq(2).all()


def test_what_the_layers_see_is_counted(tmp_path):
    """25 patches and a class token of an image; of sounds the frames, each sound for itself."""
    config = images_and_sounds.vit()
    model = ViTForImageClassification(config)
    pixels = images_and_sounds.images(config, 2, 3, torch.Generator().manual_seed(0))
    assert hc.count_cost(model, data=pixels).macs == hc.count_cost(model, seq_len=26).macs
    # Every layer: 26 (4 * 32 * 32 + 2 * 32 * 64) + 2 * 26 * 26 * 32.
    assert hc.count_cost(model, data=pixels).macs_by_layer == [256256.0] * 2
    config = images_and_sounds.wav2vec2()
    model = Wav2Vec2ForSequenceClassification(config)
    heard = [{"input_values": torch.randn(10 * frames + 10)} for frames in (12, 30, 18)]
    expected = sum(hc.count_cost(model, seq_len=frames).macs for frames in (12, 30, 18)) / 3
    assert hc.count_cost(model, data=heard).macs == pytest.approx(expected, rel=1e-12)
    unmasked = [{"input_values": torch.randn(2, 10 * frames + 10)} for frames in (12, 24)]
    assert hc.count_cost(model, data=unmasked).macs == pytest.approx(
        (hc.count_cost(model, seq_len=12).macs + hc.count_cost(model, seq_len=24).macs) / 2, rel=1e-12
    )


@every_kind
@pytest.mark.parametrize("selection", ["interpolative", "fisher"])
def test_half_the_arithmetic_is_left(kind, selection, tmp_path):
    make, rows_of, main = KINDS[kind]
    model, rows = make(0, intermediate_size=64), rows_of()
    config = hc.StructuredPruningConfig(mac_ratio=0.5, selection=selection, ridge=1e-6)
    dense = copy.deepcopy(model)
    hc.compress(model, config, data=rows)
    (step,) = hc.steps_of(model)
    seen = [5 if main == "pixel_values" else ((len(row[main]) - 10) // 5 - 2) // 2 + 1 for row in rows]
    assert step["seq_len"] == pytest.approx(sum(seen) / len(seen))
    full, left = (hc.count_cost(m, seq_len=step["seq_len"]).macs for m in (dense, model))
    assert 0.48 * full < left <= 0.5 * full
    model.save_pretrained(tmp_path)
    batch = Collator(model, main)(rows[:8])
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch).logits for m in (model, type(model).from_pretrained(tmp_path)))
    assert_equal_to_rounding(theirs, ours)


ALIKE = {
    "deit": lambda **sizes: DeiTConfig(**sizes, image_size=16, patch_size=8),
    "hubert": lambda **sizes: HubertConfig(
        **sizes, **images_and_sounds.CONVOLUTIONS, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    ),
}


@pytest.mark.parametrize("name", list(ALIKE))
def test_models_built_alike(name, tmp_path):
    torch.manual_seed(0)
    dense = AutoModel.from_config(ALIKE[name](**SIZES)).double().eval()
    rows = images() if name == "deit" else sounds()
    config = hc.StructuredPruningConfig(mac_ratio=0.6, correction=False)
    pruned = hc.compress(copy.deepcopy(dense), config, data=rows)
    # Removed heads and neurons are those that masking silences: found by their rows.
    masked = copy.deepcopy(dense)
    for before, after in zip(layers_of(masked), layers_of(pruned), strict=True):
        for out, role in ((before.attention_out, Role.VALUE), (before.ffn_out, Role.FFN_IN)):
            kept = (before.projection(role).weight[:, None] == after.projection(role).weight).all(2).any(1)
            out.weight.data[:, ~kept] = 0
    batch = images_and_sounds.cast(Collator(dense, dense.main_input_name)(rows[:4]), dense)
    batch.pop("labels")
    if name == "hubert":
        batch.pop("attention_mask")
    with torch.no_grad():
        expected, found = (m(**batch).last_hidden_state for m in (masked, pruned))
    assert_equal_to_rounding(found, expected)
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_equal_to_rounding(AutoModel.from_pretrained(tmp_path, dtype=torch.float64)(**batch)[0], found)


@pytest.mark.parametrize("stable", [False, True])
def test_linear_attention_over_sounds(stable, tmp_path):
    """How long sounds may be has to be said; padding changes nothing, and longer ones are refused."""
    torch.manual_seed(0)
    dense = AutoModel.from_config(images_and_sounds.wav2vec2(do_stable_layer_norm=stable)).double().eval()
    with pytest.raises(ValueError, match="max_tokens must be given for wav2vec2.* frames of the feature encoder"):
        hc.compress(dense, hc.LinformerConfig(projected_length=8))
    config = hc.LinformerConfig(projected_length=24, max_tokens=24, initialization="pooling", length_scaling=False)
    linear = hc.compress(copy.deepcopy(dense), config)
    (batch,) = images_and_sounds.sounds(dense.config, 1, 6, 24, torch.Generator().manual_seed(1))
    batch, live = images_and_sounds.cast(batch, dense), images_and_sounds.real_tokens(batch)
    # As many slots as frames, each of which averages one of them: attention as it was.
    slots = hc.compress(copy.deepcopy(dense), dataclasses.replace(config, slot_mask=True))
    with torch.no_grad():
        assert_equal_to_rounding(slots(**batch)[0][live], dense(**batch)[0][live])
        found = linear(**batch)[0]
    linear.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_equal_to_rounding(AutoModel.from_pretrained(tmp_path, dtype=torch.float64)(**batch)[0], found)
        with pytest.raises(ValueError, match="24"):
            linear(input_values=torch.randn(1, 300, dtype=torch.float64))


def test_linear_attention_has_a_position_for_each_patch():
    model = ViTForImageClassification(images_and_sounds.vit())
    with pytest.raises(ValueError, match="max_tokens must be at most 26, the tokens of an image, got 27"):
        hc.compress(model, hc.LinformerConfig(projected_length=8, max_tokens=27))
    hc.compress(model, hc.LinformerConfig(projected_length=8))
    assert hc.steps_of(model)[0]["max_tokens"] == 26
