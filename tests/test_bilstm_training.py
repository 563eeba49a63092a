"""The BiLSTM student in trainings, counts, timings and cards, and embeddings that start from a teacher's."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.folder_card import write_card
from hf_compress.stages.arguments import DeviceArguments, OutputArguments
from hf_compress.stages.report import Report, ReportArguments, report
from hf_compress.stages.saved import save_stage
from hf_compress.stages.training import add_teacher_columns
from hf_compress.tasks.inputs import length_sorted, row_lengths
from tests.bilstm_models import SIZES, bilstm, texts
from tests.rounding import assert_equal_to_rounding


def bert(vocab_size, **options):
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=vocab_size, **sizes, **options))


@pytest.fixture
def pairs(sentences, tmp_path):
    """A task of pairs whose label says whether both texts have the same one."""
    rows = [(*one, *other) for one, other in zip(sentences[:32], sentences[32:48] + sentences[33:49], strict=True)]
    columns = {
        "sentence1": [row[0] for row in rows], "sentence2": [row[2] for row in rows],
        "label": [int(row[1] == row[3]) for row in rows],
    }  # fmt: skip
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    return hc.load_task(hc.DataArguments(data_dir=str(tmp_path)))


def settings(folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none",
                "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}  # fmt: skip
    return {"output_dir": str(folder), **defaults, **options}


@pytest.mark.parametrize("mode", ["joint", "separate"])
def test_a_teacher_reads_pairs_jointly(pairs, tokenizer, tmp_path, mode):
    """Task, collators and trainer together; the targets are those of the teacher's own encoding."""
    own = copy.deepcopy(tokenizer)
    if mode == "separate":
        hc.read_pairs_separately_(own)
    student = hc.BiLSTMForSequenceClassification(
        hc.BiLSTMConfig.for_tokenizer(own, embedding_size=6, hidden_size=5, pair_mode=mode, **pairs.head_settings())
    )
    teacher = bert(len(tokenizer))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = pairs.encode("train", own, 32)
    common = {
        "train_dataset": rows,
        "eval_dataset": rows,
        "data_collator": pairs.collator(own),
        "processing_class": own,
    }
    add_teacher_columns(common, pairs, hc.DataArguments(max_length=32), str(tmp_path / "teacher"))
    columns = common["train_dataset"].column_names
    assert ("second_input_ids" in columns) == ("teacher_input_ids" in columns) == (mode == "separate")
    seen = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    args = hc.DistillationArguments(**settings(tmp_path / "out", alpha_task=0.5))
    trainer = hc.DistillationTrainer(student, teacher, args, **common)
    before = copy.deepcopy(student.state_dict())
    trainer.train()
    assert all(not torch.equal(before[name], value) for name, value in student.state_dict().items() if "bias" in name)
    joint = {tuple(ids) for ids in pairs.encode("train", tokenizer, 32)["input_ids"]}
    assert seen
    assert {tuple(row[row != 0].tolist()) for batch in seen for row in batch} <= joint
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])


def test_rows_of_pairs_in_batches(pairs, tokenizer):
    own = hc.read_pairs_separately_(copy.deepcopy(tokenizer))
    rows = pairs.encode("validation", own, 5)
    assert max(map(len, rows["second_input_ids"])) == 5
    assert row_lengths(rows) == [
        len(a) + len(b) for a, b in zip(rows["input_ids"], rows["second_input_ids"], strict=True)
    ]
    model = hc.BiLSTMForSequenceClassification(
        hc.BiLSTMConfig.for_tokenizer(own, embedding_size=6, hidden_size=5, pair_mode="separate")
    ).eval()
    for batch in length_sorted(rows, 7, own):
        index = batch.pop("index")
        logits = model(**batch).logits
        for place, row in enumerate(rows.select(index)):
            single = {name: torch.tensor([row[name]]) for name in ("input_ids", "second_input_ids")}
            assert_equal_to_rounding(logits[place], model(**single).logits[0])


def test_a_task_of_single_texts_is_refused(sentences, tokenizer, tmp_path):
    columns = {"sentence": [text for text, _ in sentences], "label": [label for _, label in sentences]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    task = hc.load_task(hc.DataArguments(data_dir=str(tmp_path)))
    own = hc.read_pairs_separately_(copy.deepcopy(tokenizer))
    with pytest.raises(ValueError, match="has one text column .sentence., and the tokenizer belongs to a model that"):
        task.encode("train", own, 16)
    joint = [{"input_ids": [1, 2], "labels": 0}]
    with pytest.raises(ValueError, match="must hold second_input_ids, got input_ids, labels: encode pairs"):
        hc.PairCollator(own)(joint)


def test_teacher_without_tokenizer_is_refused(pairs, tokenizer, tmp_path):
    own = hc.read_pairs_separately_(copy.deepcopy(tokenizer))
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ValueError, match="the teacher reads pairs as one sequence"):
        add_teacher_columns({"processing_class": own}, pairs, hc.DataArguments(), str(tmp_path / "teacher"))


def layer_trainer(folder, compat=None, **options):
    rows = [{"input_ids": torch.tensor([3, 4, 5]), "attention_mask": torch.ones(3), "labels": 1}] * 8
    args = hc.DistillationArguments(**settings(folder, alpha_layer=1.0, max_steps=2, compat=compat))
    student = hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(**{**SIZES, "num_layers": 2, **options}))
    return hc.DistillationTrainer(student, bert(SIZES["vocab_size"]), args, train_dataset=rows)


def test_hidden_states_are_distilled(tmp_path):
    trainer = layer_trainer(tmp_path)
    trainer.train()
    losses = [entry["loss/layer"] for entry in trainer.state.log_history if "loss/layer" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_states_of_separate_texts_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match="alpha_layer compares the states of the same tokens"):
        layer_trainer(tmp_path, pair_mode="separate").train()


def test_embeddings_of_words_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match="compat='cald' compares the embeddings, too, which are no states of a "):
        layer_trainer(tmp_path, compat="cald")


@pytest.mark.parametrize(("num_labels", "problem"), [(2, None), (1, "regression"), (3, "multi_label_classification")])
def test_accumulation_equals_the_large_batch(tokenizer, sentences, tmp_path, num_labels, problem):
    """A stock Trainer: every loss counts micro-batches alike."""
    rows = []
    for text, label in sentences[:16]:
        target = {1: float(label), 2: label, 3: [float(label), 0.0, 1.0]}[num_labels]
        rows.append({"input_ids": tokenizer(text)["input_ids"], "labels": target})
    states = []
    for size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        config = hc.BiLSTMConfig.for_tokenizer(
            tokenizer, embedding_size=6, hidden_size=5, dropout=0.0, num_labels=num_labels, problem_type=problem
        )
        model = hc.BiLSTMForSequenceClassification(config)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2,
                   "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}  # fmt: skip
        args = TrainingArguments(**settings(tmp_path / str(size), **options))
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, args, train_dataset=rows, data_collator=collator).train()
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert_equal_to_rounding(states[1][name], value)


@pytest.mark.parametrize("layers", [1, 3])
def test_arithmetic_is_what_torch_does(layers):
    model = bilstm(num_layers=layers)
    ids, _ = texts([7, 7])
    # In double precision torch runs an LSTM as the matrix products that its counter knows.
    with FlopCounterMode(display=False) as counter:
        model(ids)
    head = 2 * 2 * 2 * model.config.hidden_size * model.config.num_labels
    cost = hc.count_cost(model, seq_len=7, batch_size=2)
    assert cost.macs == sum(cost.macs_by_layer) == (counter.get_total_flops() - head) / 2
    assert len(cost.macs_by_layer) == layers
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_arithmetic_on_data():
    (ids, mask), (second, second_mask) = texts([4, 9]), texts([2, 5], seed=2)
    joint = {"input_ids": ids, "attention_mask": mask}
    pair = {**joint, "second_input_ids": second, "second_attention_mask": second_mask}
    each = hc.count_cost(bilstm(), seq_len=1).macs
    assert each == 2 * 4 * SIZES["hidden_size"] * (SIZES["embedding_size"] + SIZES["hidden_size"])
    assert hc.count_cost(bilstm(), data=[joint]).macs == pytest.approx(6.5 * each)
    assert hc.count_cost(bilstm(mask_padding=False), data=[joint]).macs == pytest.approx(9 * each)
    vectors = {"inputs_embeds": torch.zeros(*joint["input_ids"].shape, 6), "attention_mask": joint["attention_mask"]}
    assert hc.count_cost(bilstm(), data=[vectors]).macs == pytest.approx(6.5 * each)
    with pytest.raises(ValueError, match="data must hold dicts with input_ids, got the keys"):
        hc.count_cost(bilstm(), data=[{"attention_mask": joint["attention_mask"]}])
    assert hc.count_cost(bilstm(pair_mode="separate"), data=[pair]).macs == pytest.approx(10 * each)


def test_latency_reads_both_texts():
    (ids, mask), (second, second_mask) = texts([4, 9]), texts([2, 5], seed=2)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "second_input_ids": second,
        "second_attention_mask": second_mask,
    }
    models = {"separate": bilstm(pair_mode="separate"), "other": bilstm(seed=1, pair_mode="separate")}
    timed = hc.measure_latency(models, [batch], repeats=2, warmup=0)
    assert [entry.name for entry in timed] == list(models)
    assert all(entry.batch_size == 2 and entry.p50 > 0 and entry.peak_memory > 0 for entry in timed)


def test_a_report_puts_a_separate_student_beside_its_teacher(pairs, tokenizer, tmp_path):
    own = hc.read_pairs_separately_(copy.deepcopy(tokenizer))
    config = hc.BiLSTMConfig.for_tokenizer(
        own, embedding_size=6, hidden_size=5, pair_mode="separate", **pairs.head_settings()
    )
    for name, model, reads in (
        ("teacher", bert(len(tokenizer), **pairs.head_settings()), tokenizer),
        ("student", hc.BiLSTMForSequenceClassification(config), own),
    ):
        save_stage(tmp_path / name, model, reads, {})
    found = report(Report(
        comparison=ReportArguments([str(tmp_path / name) for name in ("teacher", "student")], latency_batch_sizes=[4],
                                   latency_repeats=1, latency_examples=8),
        data=hc.DataArguments(data_dir=str(tmp_path), max_length=32), output=OutputArguments(str(tmp_path / "out")),
        device=DeviceArguments("cpu"),
    ))  # fmt: skip
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["models"][1]
    assert found
    lengths = row_lengths(pairs.encode("validation", own, 32))
    each = 2 * 4 * 5 * (6 + 5)
    assert entry["cost"]["macs"] == pytest.approx(each * sum(lengths) / len(lengths))
    assert entry["latency"][0]["p50"] > 0
    assert 0 <= entry["metrics"]["accuracy"] <= 1


def test_card_says_what_opens_it(tmp_path):
    write_card(tmp_path, bilstm())
    text = ModelCard.load(tmp_path / "README.md").text
    assert "`BiLSTMForSequenceClassification`, which transformers knows after the import" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert code.startswith("import hf_compress")
    assert "AutoModelForSequenceClassification.from_pretrained" in code


def test_embeddings_start_from_the_teacher():
    teacher = bert(SIZES["vocab_size"] + 3)
    table = teacher.get_input_embeddings().weight.detach().double()[:-3]
    student = bilstm()
    padding = student.bilstm.embeddings.weight[0].clone()
    share = hc.students.start_embeddings_(student, teacher)
    found = student.bilstm.embeddings.weight.detach()
    # The oracle is numpy's singular value decomposition; directions are known up to their sign.
    centred = (table - table.mean(0)).numpy()
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = torch.tensor(left[:, :6] * values[:6])
    signs = (found[1:] * expected[1:]).sum(0).sign()
    torch.testing.assert_close(found[1:], (expected * signs)[1:], rtol=0, atol=1e-9)
    assert share == pytest.approx((values[:6] ** 2).sum() / (values**2).sum())
    assert torch.equal(found[0], padding)
    assert student.bilstm.embeddings.weight.requires_grad
    assert found.data_ptr() != teacher.get_input_embeddings().weight.data_ptr()


def test_scale_and_freezing_of_started_embeddings(tokenizer, tmp_path):
    teacher, student = bert(SIZES["vocab_size"]), bilstm()
    hc.students.start_embeddings_(student, teacher, scale=0.3, frozen=True)
    table = student.bilstm.embeddings.weight
    assert table[1:].std().item() == pytest.approx(0.3, rel=0.05)
    before = table.detach().clone()
    rows = [{"input_ids": torch.tensor([3, 4, 5]), "labels": 1}] * 8
    args = TrainingArguments(**settings(tmp_path, max_steps=1))
    Trainer(student, args, train_dataset=rows).train()
    assert torch.equal(table, before)


def test_wrong_teachers_of_embeddings():
    with pytest.raises(ValueError, match="must have an embedding for each of the student's 40 tokens, got 39"):
        hc.students.start_embeddings_(bilstm(), bert(39))
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        hc.students.start_embeddings_(bilstm(), bert(40), scale=0)
