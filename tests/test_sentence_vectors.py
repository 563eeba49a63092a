"""Distillation of sentence vectors: the losses beside loops, teachers of other widths, the cache, what is refused."""

import json

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_compress as hc
from hf_compress.training.sentence_vectors import has_no_head


SIZES = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 32, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
RNG = np.random.default_rng(0)
ROWS = [{"input_ids": torch.from_numpy(RNG.integers(1, 99, length))} for length in RNG.integers(3, 12, 24)]


def pad(rows):
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def encoder(seed, width=16):
    torch.manual_seed(seed)
    return BertModel(BertConfig(hidden_size=width, **SIZES)).eval()


def trainer_of(folder, student, teacher, **options):
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 24,
                "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
                "learning_rate": 3e-3, "alpha_task": 0.0, "prediction_loss_only": True, "seed": 3}  # fmt: skip
    return hc.DistillationTrainer(
        model=student, teacher_model=teacher, args=hc.DistillationArguments(str(folder), **{**defaults, **options}),
        train_dataset=ROWS, eval_dataset=ROWS, data_collator=pad,
    )  # fmt: skip


@torch.no_grad()
def vectors(model, pooling="mean"):
    """[rows, D], one row after the other, without padding."""
    found = []
    for row in ROWS:
        states = model(input_ids=row["input_ids"][None]).last_hidden_state[0].double().numpy()
        pooled = {"mean": states.mean(0), "cls": states[0], "max": states.max(0)}[pooling]
        found.append(pooled / np.sqrt((pooled**2).sum()))
    return np.stack(found)


def squared_differences(ours, theirs):
    """Of the cosines of all pairs of different sentences."""
    count, total = len(ours), 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                total += (sum(ours[i] * ours[j]) - sum(theirs[i] * theirs[j])) ** 2
    return total / (count * (count - 1))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_losses_are_those_of_loops(tmp_path, pooling):
    models = []
    for name, seed in (("student", 0), ("teacher", 1)):
        encoder(seed).save_pretrained(tmp_path / name)
        (tmp_path / name / "1_Pooling").mkdir()
        modules = [{"idx": 0, "name": "0", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
        (tmp_path / name / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
        models.append(AutoModel.from_pretrained(tmp_path / name))
    # A teacher given by its folder is opened without a head, as the student.
    options = {"alpha_output": 2.0, "alpha_similarity": 3.0}
    trainer = trainer_of(tmp_path / "out", models[0], str(tmp_path / "teacher"), **options)
    found, _ = trainer.loss_terms(models[0], pad(ROWS))
    ours, theirs = (vectors(model, pooling) for model in models)
    assert found.keys() == {"output", "similarity"}
    assert float(found["output"].detach()) == pytest.approx(2 * (1 - (ours * theirs).sum(-1)).mean(), rel=1e-5)
    assert float(found["similarity"].detach()) == pytest.approx(3 * squared_differences(ours, theirs), rel=1e-5)


def test_evaluations_have_the_losses_and_labels_are_nothing_to_them(tmp_path):
    """Rows with scores, as STS-B has them, teach as rows without."""
    models = encoder(0), encoder(1)
    options = {"alpha_output": 2.0, "alpha_similarity": 3.0}
    trainer = trainer_of(tmp_path, *models, **options)

    def with_labels(rows):
        return {**pad(rows), "labels": torch.zeros(len(rows))}

    labelled = trainer_of(tmp_path, *models, **options)
    labelled.data_collator = with_labels
    ours, theirs = (vectors(model) for model in models)
    for each in (trainer, labelled):
        found = each.evaluate()
        assert found["eval_loss/output"] == pytest.approx(2 * (1 - (ours * theirs).sum(-1)).mean(), rel=1e-5)
        assert found["eval_loss"] == pytest.approx(found["eval_loss/output"] + found["eval_loss/similarity"], rel=1e-5)
    labelled.train()


def test_models_that_give_logits_are_no_encoders(tmp_path):
    class Own(BertModel):
        def forward(self, input_ids, attention_mask=None, **more):
            states = super().forward(input_ids, attention_mask).last_hidden_state
            return SequenceClassifierOutput(logits=states[:, 0, :2])

    torch.manual_seed(0)
    student, teacher = (Own(BertConfig(hidden_size=16, **SIZES)).eval() for _ in range(2))
    trainer = trainer_of(tmp_path, student, teacher)
    found, _ = trainer.loss_terms(student, pad(ROWS))
    assert found.keys() == {"output"}
    assert trainer.session.pooling is None


def test_a_student_learns_the_vectors_of_its_teacher(tmp_path):
    student, teacher = encoder(0), encoder(1)
    before = (vectors(student) * vectors(teacher)).sum(-1).mean()
    trainer_of(tmp_path, student, teacher, num_train_epochs=20).train()
    assert (vectors(student.eval()) * vectors(teacher)).sum(-1).mean() > before + 0.3


def test_a_teacher_of_another_width_teaches_how_alike_sentences_are(tmp_path):
    student, teacher = encoder(0), encoder(1, width=24)
    before = squared_differences(vectors(student), vectors(teacher))
    options = {"alpha_output": 0.0, "alpha_similarity": 1.0, "num_train_epochs": 20}
    trainer_of(tmp_path, student, teacher, **options).train()
    assert squared_differences(vectors(student.eval()), vectors(teacher)) < 0.3 * before


def test_a_single_sentence_has_no_pairs(tmp_path):
    trainer = trainer_of(tmp_path, encoder(0), encoder(1), alpha_output=0.0, alpha_similarity=1.0)
    found, _ = trainer.loss_terms(trainer.model, pad(ROWS[:1]))
    assert float(found["similarity"].detach()) == 0


def test_stored_vectors_teach_the_same(tmp_path):
    states = []
    for name, options in (("live", {}), ("cold", {"teacher_cache_dir": str(tmp_path / "cache")}),
                          ("warm", {"teacher_cache_dir": str(tmp_path / "cache")})):  # fmt: skip
        trainer = trainer_of(tmp_path / name, encoder(0), encoder(1), alpha_similarity=1.0, alpha_layer=1.0, **options)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert trainer.teacher_cache.misses == 0
    live, cold, warm = states
    assert all(torch.equal(warm[name], cold[name]) for name in warm)
    # Stored once, with the padding of one batch.
    for name, values in live.items():
        torch.testing.assert_close(cold[name], values, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have 16 numbers.*Set alpha_output=0 and alpha_similarity above 0"):
        trainer_of(tmp_path, encoder(0), encoder(1, width=24))
    classifier = BertForSequenceClassification(BertConfig(hidden_size=16, **SIZES))
    with pytest.raises(ValueError, match="alpha_similarity must be 0 for BertForSequenceClassification"):
        trainer_of(tmp_path, classifier, encoder(1), alpha_similarity=1.0)
    with pytest.raises(ValueError, match="teacher of a sentence encoder must be one, too"):
        trainer_of(tmp_path, encoder(0), classifier)
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2 with alpha_similarity"):
        hc.DistillationArguments(str(tmp_path), alpha_similarity=1.0, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="alpha_similarity must be zero or positive"):
        hc.DistillationArguments(str(tmp_path), alpha_similarity=-1.0)


def test_an_encoder_that_pools_in_an_unknown_way_is_refused(tmp_path):
    encoder(1).save_pretrained(tmp_path / "teacher")
    modules = [{"idx": 0, "name": "0", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "teacher" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"vectors of .*teacher' cannot be targets: its vectors go through Dense"):
        trainer_of(tmp_path / "out", encoder(0), str(tmp_path / "teacher"))


def test_folders_that_pool_differently_are_told(tmp_path, caplog):
    encoder(1).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "1_Pooling").mkdir()
    modules = [{"idx": 0, "name": "0", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "teacher" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "teacher" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    trainer_of(tmp_path / "out", encoder(0), str(tmp_path / "teacher"))
    assert "sentence vectors by mean, its teacher by cls" in caplog.text


def test_pruned_encoders_have_no_head_either():
    student = encoder(0)
    assert has_no_head(student)
    data = [{"input_ids": row["input_ids"][None]} for row in ROWS]
    hc.compress(student, hc.StructuredPruningConfig(mac_ratio=0.5), data=data)
    assert has_no_head(student)
    assert not has_no_head(BertForSequenceClassification(BertConfig(hidden_size=16, **SIZES)))
