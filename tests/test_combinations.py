"""What users put together: trainers that build their models, adapters, several evaluations, pruned students."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
)

import hf_compress as hc
from hf_compress.core.modes import evaluating
from hf_compress.stages.models import open_model
from hf_compress.training.averages import Averages
from hf_compress.training.snapshots import open_snapshot
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


HEAD = "sequence_classification"
# PEFT asks for a property that transformers has renamed.
ADAPTERS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LORA = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture
def rows(tokenizer, sentences):
    return [{**tokenizer(text), "labels": label} for text, label in sentences]


@pytest.fixture
def train(tokenizer, rows, tmp_path):
    """`train(model=..., kind=..., **trainer arguments)`: a trainer that has done four steps."""

    def make(kind=hc.CompressionTrainer, callbacks=None, steps=4, **kwargs):
        settings = {**QUIET, "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
        args = hc.DistillationArguments if kind is hc.DistillationTrainer else TrainingArguments
        trainer = kind(
            args=args(str(tmp_path / "out"), **settings), train_dataset=rows, eval_dataset=rows[:16],
            processing_class=tokenizer, callbacks=callbacks, **kwargs,
        )  # fmt: skip
        trainer.train()
        return trainer

    return make


def soft(model):
    fields = {"masking_mode": "soft", "final_token_threshold": 0.02}
    return hc.compress(model("bert", HEAD), hc.TokenPruningConfig(**fields))


@pytest.mark.parametrize("built", ["model", "model_init"])
def test_models_that_the_trainer_builds_are_pruned_alike(model, train, built):
    callbacks = [hc.ThresholdAnnealingCallback(learning_rate=1e-2), hc.StageSwitchCallback(0.75)]
    given = {"model": soft(model)} if built == "model" else {"model_init": lambda: soft(model)}
    trainer = train(callbacks=callbacks, **given)
    assert "loss/threshold" in trainer.state.log_history[0]
    assert len(trainer.optimizer.param_groups) == 3
    assert trainer.optimizer.param_groups[-1]["initial_lr"] == 1e-2
    assert 0 < trainer.evaluate()["eval_relative_macs"] < 1
    assert trainer.model.config.token_prune_stage == "hard"


def by_hand(model, architecture="bert"):
    dense = model(architecture, HEAD)
    dense.config.prune_mode, dense.config.final_token_threshold = "absolute_threshold", 0.02
    return dense


def pruning_of(model):
    return [step["method"] for step in hc.steps_of(model)]


@ADAPTERS
def test_fields_written_by_hand_are_honoured_everywhere(model, train, tmp_path):
    assert pruning_of(train(model_init=lambda: by_hand(model)).model) == ["token_pruning"]
    adapted = get_peft_model(by_hand(model), LORA)
    with pytest.raises(ValueError, match="must be a plain torch.nn.Linear.*Merge adapters"):
        train(model=adapted)
    teacher = by_hand(model)
    train(kind=hc.DistillationTrainer, model=model("bert", HEAD), teacher_model=teacher)
    assert pruning_of(teacher) == ["token_pruning"]
    folder = tmp_path / "hand"
    by_hand(model).save_pretrained(folder)
    assert pruning_of(open_model(str(folder))) == pruning_of(open_snapshot(str(folder))) == ["token_pruning"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "prune_mode": "topkk"}))
    with pytest.raises(ValueError, match="prune_mode must be one of .*, got 'topkk'"):
        open_model(str(folder))


@ADAPTERS
def test_a_pruned_student_with_adapters_is_measured(model, train):
    config = hc.TokenPruningConfig(final_token_threshold=0.02)
    student = hc.compress(model("bert", HEAD), config)
    student.eval()
    plain = train(model=copy.deepcopy(student), steps=1)
    adapted = train(model=get_peft_model(student, LORA), steps=1)
    assert adapted.state.log_history[0]["prune/relative_macs"] == plain.state.log_history[0]["prune/relative_macs"]
    assert 0 < adapted.evaluate()["eval_relative_macs"] < 1


@ADAPTERS
def test_thresholds_are_not_learned_below_adapters(model, train):
    adapted = get_peft_model(soft(model), LORA)
    with pytest.raises(ValueError, match="A model with adapters must have token_pruning finished"):
        train(model=adapted)


def test_every_evaluation_has_its_own_terms(model, train, rows):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(final_token_threshold=0.012))
    teacher = model("bert", HEAD)
    torch.nn.init.normal_(teacher.classifier.weight)
    trainer = train(kind=hc.DistillationTrainer, model=student, teacher_model=teacher)
    long = [row for row in rows if len(row["input_ids"]) > 9]
    alone = trainer.evaluate()
    assert alone["eval_loss/task"] + alone["eval_loss/output"] == pytest.approx(alone["eval_loss"], abs=1e-5)
    predicted = trainer.predict(long).metrics
    assert predicted["test_loss/task"] + predicted["test_loss/output"] == pytest.approx(
        predicted["test_loss"], abs=1e-5
    )
    assert {"test_relative_macs", "test_loss/task"} <= predicted.keys()
    for name in ("eval_loss/task", "eval_loss/output", "eval_relative_macs"):
        assert trainer.evaluate()[name] == pytest.approx(alone[name], rel=1e-5)
    both = trainer.evaluate({"short": rows[:16], "long": long})
    assert both["eval_short_relative_macs"] == alone["eval_relative_macs"]
    assert both["eval_long_relative_macs"] == predicted["test_relative_macs"] != alone["eval_relative_macs"]
    # A test during training neither takes nor gives the training's averages.
    trainer.losses.averages["train"].add("loss/task", torch.tensor(5.0))
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert "loss/task" not in metrics
    assert metrics["test_loss/task"] == pytest.approx(alone["eval_loss/task"], rel=1e-5)
    assert trainer.losses.averages["train"].take()["loss/task"] == 5


@pytest.mark.parametrize("kind", [hc.CompressionTrainer, hc.DistillationTrainer, Trainer])
def test_zeros_survive_another_training(model, train, kind):
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude")
    student = hc.compress(model("bert", HEAD), config)
    before = copy.deepcopy(student.state_dict())
    teacher = {"teacher_model": model("bert", HEAD)} if kind is hc.DistillationTrainer else {}
    if kind is Trainer:
        teacher["callbacks"] = [hc.HeldZerosCallback()]
    trainer = train(kind=kind, model=student, **teacher)
    pruned = 0
    for name, parameter in student.named_parameters():
        if name.endswith("dense.weight") or name.endswith(("query.weight", "key.weight", "value.weight")):
            zero = before[name] == 0
            assert bool((parameter[zero] == 0).all()), name
            pruned += int(zero.sum())
            if bool(zero.any()):
                assert not torch.equal(parameter.detach(), before[name]), name
    assert pruned > 1000
    added = [x for x in trainer.callback_handler.callbacks if isinstance(x, hc.HeldZerosCallback)]
    assert len(added) == (kind is Trainer)


def test_a_pruning_callback_decides_anew(model, train):
    student = hc.compress(
        model("bert", HEAD), hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.9, criterion="magnitude")
    )
    config = hc.WeightPruningConfig(
        pattern="2:4", target_sparsity=0.5, criterion="magnitude", start_step=1, end_step=2, pruning_frequency=1
    )
    train(model=student, callbacks=[hc.WeightPruningCallback(config)], steps=6)
    weight = student.bert.encoder.layer[0].attention.self.query.weight
    assert 0.5 <= float((weight == 0).float().mean()) < 0.6


def test_several_configs_are_done_or_none(model, batches):
    dense = model("bert", HEAD)
    before = copy.deepcopy(dense.state_dict())
    data = batches(dense.config)
    with pytest.raises(ValueError, match="mac_ratio"):
        hc.compress(
            dense, hc.LinformerConfig(projected_length=8), hc.StructuredPruningConfig(mac_ratio=0.02), data=data
        )
    assert hc.steps_of(dense) == []
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_multiple_choice(model, batches):
    torch.manual_seed(0)
    dense = AutoModelForMultipleChoice.from_config(model("bert").config).eval()
    flat = batches(dense.config)
    choices = [{k: v.view(4, 2, -1) for k, v in batch.items()} for batch in flat]
    costs = [hc.count_cost(dense, data=data).macs for data in (flat, choices)]
    assert costs[0] == costs[1]
    small = [
        hc.compress(copy.deepcopy(dense), hc.StructuredPruningConfig(mac_ratio=0.6), data=data)
        for data in (flat, choices)
    ]
    ours, theirs = (part.state_dict() for part in small)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_modes_of_all_modules_come_back(model, batches):
    dense = hc.compress(model("bert", HEAD), hc.TokenPruningConfig())
    dense.train()
    dense.bert.encoder.layer[1].eval()
    before = {name: module.training for name, module in dense.named_modules()}
    data = batches(dense.config, count=2)
    hc.count_cost(dense, data=data)
    hc.measure_latency({"a": dense}, data, repeats=1)
    with pytest.raises(IndexError):
        hc.count_cost(dense, data=[{"input_ids": torch.full((2, 4), 5000)}])
    assert before == {name: module.training for name, module in dense.named_modules()}
    hc.compress(dense, hc.StructuredPruningConfig(mac_ratio=0.6), data=data)
    assert all(module.training == before[name] for name, module in dense.named_modules() if name in before)
    with pytest.raises(KeyError), evaluating(dense):
        raise KeyError
    assert not dense.bert.encoder.layer[1].training
    assert dense.bert.encoder.layer[0].training


def test_a_student_cannot_teach_itself(model, train):
    same = model("bert", HEAD)
    with pytest.raises(ValueError, match="teacher_model must be another object than model"):
        train(kind=hc.DistillationTrainer, model=same, teacher_model=same)


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_pruned_models_can_be_pickled(model, batches, architecture):
    pruned = hc.compress(model(architecture, HEAD), hc.TokenPruningConfig(final_token_threshold=0.02))
    batch = batches(pruned.config, count=1)[0]
    with torch.no_grad():
        expected = pruned(**batch).logits
        for again in (pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned)):
            assert_equal_to_rounding(again(**batch).logits, expected)
            assert type(again.base_model) is type(pruned.base_model)


def test_refusals_name_what_is_wrong(model, batches, tmp_path):
    dense = model("bert", HEAD)
    with pytest.raises(ValueError, match="data must be an iterable of input dicts, got one dict"):
        hc.compress(dense, hc.StructuredPruningConfig(), data=batches(dense.config, count=1)[0])
    with pytest.raises(ValueError, match=r"data must hold dicts with input_ids, got the keys \['foo'\]"):
        hc.count_cost(dense, data=[{"foo": torch.ones(1)}])
    with torch.device("meta"):
        shapes = AutoModelForSequenceClassification.from_config(BertConfig(num_hidden_layers=1))
    for verb in (lambda: hc.compress(shapes, hc.TokenPruningConfig()), lambda: hc.count_cost(shapes)):
        with pytest.raises(ValueError, match="Weights must be loaded"):
            verb()
    for wrong in ([0.5, 1], [(0, 0), (1, 2)]):
        with pytest.raises(ValueError, match="layer_map must hold one teacher layer"):
            hc.DistillationArguments(str(tmp_path), alpha_layer=1.0, layer_map=wrong)
    with pytest.raises(ValueError, match="temperature must be finite, got nan"):
        hc.TokenPruningConfig(temperature=float("nan"))


def test_structured_pruning_says_that_it_fills_zeros(model, batches, caplog):
    config = hc.WeightPruningConfig(target_sparsity=0.5, pattern="1x1", criterion="magnitude")
    sparse = hc.compress(model("bert", HEAD), config)
    hc.compress(sparse, hc.StructuredPruningConfig(mac_ratio=0.7), data=batches(sparse.config))
    assert "fills zeros of the output projections again" in caplog.text


@ADAPTERS
def test_models_quantised_by_others_still_teach_and_learn(model, train):
    other = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    teacher, student = model("bert", HEAD), model("bert", HEAD)
    teacher.config.quantization_config = student.config.quantization_config = other
    trainer = train(kind=hc.DistillationTrainer, model=get_peft_model(student, LORA), teacher_model=teacher)
    assert trainer.state.global_step == 4
    assert trainer.methods.trainings == {}


def test_averages_of_half_precision_do_not_overflow():
    seen = Averages()
    for _ in range(2):
        seen.add("task", torch.tensor(2000.0, dtype=torch.float16), weight=64)
    assert seen.take() == {"task": 2000.0}


@pytest.mark.parametrize("kind", [XLMRobertaConfig, CamembertConfig])
@pytest.mark.parametrize("config", [
    hc.StructuredPruningConfig(mac_ratio=0.6), hc.LinformerConfig(projected_length=4),
    hc.TokenPruningConfig(final_token_threshold=0.6, score_reference_length=8),
], ids=["structured", "linear", "tokens"])  # fmt: skip
def test_relatives_of_roberta(kind, config, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 32, "max_position_embeddings": 34, "pad_token_id": 1,
             "initializer_range": 0.2}  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(kind(**sizes))
    ids = torch.randint(5, 99, (8, 12), generator=torch.Generator().manual_seed(0))
    ids[3, 7:] = 1
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    with torch.no_grad():
        before = model.eval()(**batch).logits
        hc.compress(model, config, data=[batch])
        after = model.eval()(**batch).logits
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert_equal_to_rounding(reloaded(**batch).logits, after)
    assert differ_beyond_rounding(before, after)
