"""Teachers and pruning in training for models that read images or sounds."""

import pytest
import torch
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

import hf_compress as hc
from hf_compress.core.examples import batches_of
from hf_compress.training.losses import hidden_distance, output_divergence


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
    pruned = [m for n, m in reopened.named_modules() if "layers." in n and isinstance(m, torch.nn.Linear)]
    assert len(pruned) == 12
    for module in pruned:
        assert (module.weight.view(-1, 4) == 0).sum(1).eq(2).all()
