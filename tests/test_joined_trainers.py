"""Our losses, teachers and callbacks inside other trainers: of transformers, of users, and of TRL."""

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.training.joined_arguments import join_arguments
from tests.crash_program import Rows, pad
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding
from tests.test_distilled_positions import batch_of, language_model


ROWS = [Rows()[index] for index in range(16)]
PAIRS = [{name: value[i] for name, value in batch_of().items()} for i in range(3)]
PLAIN = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 3, "save_strategy": "no",
         "dataloader_pin_memory": False, "logging_steps": 1, "per_device_train_batch_size": 2,
         "learning_rate": 0.1, "optim": "sgd"}  # fmt: skip


def bert(seed=0, layers=1):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def weights_after(trainer):
    trainer.train()
    return trainer.model.state_dict()


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal_to_rounding(found[name], value)


class Blind(Trainer):
    """Half of the task's loss, and outputs that nothing can be learned from, as of TRL."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss / 2
        with torch.no_grad():
            outputs = model(**inputs) if return_outputs else None
        return (loss, outputs) if return_outputs else loss


class LossAlone(Trainer):
    """As one writes it who never evaluates with it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss / 2
        return (loss, {"loss": loss}) if return_outputs else loss


@pytest.mark.parametrize(("ours", "theirs"), [
    (hc.DistillationTrainer, Blind), (hc.DistillationTrainer, LossAlone), (hc.JointTeacherTrainer, Blind),
])  # fmt: skip
def test_the_loss_of_another_trainer_beside_ours(tmp_path, ours, theirs):
    """Their half of the loss is our weight of one half; the teacher's terms reach the student in both."""
    both, fields = hc.join_trainers(ours, theirs), {"alpha_layer": 0.5, **PLAIN}
    given = {"train_dataset": ROWS, "data_collator": pad}
    args = both.arguments_class(str(tmp_path / "a"), **fields)
    joined = both(bert(0), teacher_model=bert(1, 2), args=args, **given)
    args = ours.arguments_class(str(tmp_path / "b"), alpha_task=0.5, **fields)
    expected = weights_after(ours(bert(0), teacher_model=bert(1, 2), args=args, **given))
    assert_same_weights(weights_after(joined), expected)
    args = both.arguments_class(str(tmp_path / "c"), **{**fields, "alpha_layer": 0.0, "alpha_output": 0.0})
    without = weights_after(both(bert(0), teacher_model=bert(1, 2), args=args, **given))
    assert any(differ_beyond_rounding(value, expected[name]) for name, value in without.items())
    assert {"eval_loss/task", "eval_loss/output", "eval_loss/layer"} <= joined.evaluate(ROWS).keys()


def test_thresholds_learn_inside_another_trainer(tmp_path):
    """Its passes without gradients leave nothing behind that the loss of the thresholds would read."""
    trained = []
    for kind, options in ((hc.join_trainers(hc.DistillationTrainer, Blind), {}),
                          (hc.DistillationTrainer, {"alpha_task": 0.5})):  # fmt: skip
        student = hc.compress(bert(0, 2), hc.TokenPruningConfig(masking_mode="soft"))
        trainer = kind(
            student, teacher_model=bert(1, 2), args=kind.arguments_class(str(tmp_path), **options, **PLAIN),
            train_dataset=ROWS, data_collator=pad,
            callbacks=[hc.ThresholdAnnealingCallback(lambda_threshold=0.1, learning_rate=1e-2)],
        )  # fmt: skip
        begun = student.bert.token_thresholds.values.clone()
        trained.append(weights_after(trainer))
        assert differ_beyond_rounding(trained[-1]["bert.token_thresholds.values"], begun)
    assert_same_weights(*trained)


def test_a_sequence_to_sequence_trainer_distils_and_generates(tmp_path):
    both = hc.join_trainers(hc.DistillationTrainer, Seq2SeqTrainer, Seq2SeqTrainingArguments)
    options, generating = {"temperature": 3.0, **PLAIN}, {"predict_with_generate": True, "generation_max_length": 7}
    args = both.arguments_class(str(tmp_path / "a"), **generating, **options)
    joined = both(language_model("t5", 0), teacher_model=language_model("t5", 1), args=args, train_dataset=PAIRS)
    found = weights_after(joined)
    # Both draw the same dropout: each is seeded when it is made.
    args = hc.DistillationArguments(str(tmp_path / "b"), **options)
    alone = hc.DistillationTrainer(language_model("t5", 0), language_model("t5", 1), args, train_dataset=PAIRS)
    assert_same_weights(found, weights_after(alone))
    stock = Seq2SeqTrainer(joined.model, Seq2SeqTrainingArguments(str(tmp_path / "c"), **generating, **PLAIN))
    written, expected = joined.predict(PAIRS).predictions, stock.predict(PAIRS).predictions
    assert written.ndim == 2
    assert (written == expected).all()


def test_weights_are_pruned_in_a_sequence_to_sequence_trainer(tmp_path):
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, start_step=1, end_step=2, pruning_frequency=1)
    args = Seq2SeqTrainingArguments(str(tmp_path), **PLAIN)
    trainer = Seq2SeqTrainer(
        language_model("t5", 0), args, train_dataset=PAIRS, callbacks=[hc.WeightPruningCallback(config)]
    )
    trainer.train()
    weight = trainer.model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert float((weight == 0).float().mean()) == 0.5
    assert [step["method"] for step in hc.steps_of(trainer.model)] == ["weight_pruning"]


def test_a_joined_training_goes_on_where_it_was_stopped(tmp_path):
    both, weights = hc.join_trainers(hc.DistillationTrainer, Blind), []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        args = both.arguments_class(str(tmp_path / "run"), **{**PLAIN, "save_strategy": "steps", "save_steps": 2})
        trainer = both(bert(0), teacher_model=bert(1, 2), args=args, train_dataset=ROWS, data_collator=pad)
        trainer.train(resume_from_checkpoint=resume)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


@dataclass
class Quick(TrainingArguments):
    """Another default, a list, and a field of its own."""

    learning_rate: float = 0.125
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.5])

    def __post_init__(self):
        super().__post_init__()
        self.seen = True


@dataclass
class Warm(TrainingArguments):
    """A name that ours has given another meaning."""

    temperature: float = 0.0


def test_joined_arguments_have_the_fields_and_defaults_of_both():
    kind = join_arguments(hc.DistillationArguments, Quick)
    assert kind is join_arguments(hc.DistillationArguments, Quick)
    assert issubclass(kind, hc.DistillationArguments)
    assert issubclass(kind, Quick)
    args = kind("out", alpha_output=0.5, use_cpu=True)
    assert (args.learning_rate, args.betas, args.alpha_output, args.temperature) == (0.125, [0.5], 0.5, 2.0)
    assert args.seen
    assert args.betas is not kind("out", use_cpu=True).betas
    for other in (pickle.loads(pickle.dumps(args)), copy.copy(args), copy.deepcopy(args)):
        assert type(other) is kind
        assert other.to_dict() == args.to_dict()

    @dataclass
    class Derived(kind):
        more: int = 1

    assert type(copy.copy(Derived("out", use_cpu=True))) is Derived
    with pytest.raises(ValueError, match=r"alpha_output must be zero or positive"):
        kind("out", alpha_output=-1.0)
    with pytest.raises(ValueError, match="must not both have temperature"):
        join_arguments(hc.DistillationArguments, Warm)
    assert join_arguments(hc.JointTeacherArguments, hc.DistillationArguments) is hc.JointTeacherArguments
    assert join_arguments(TrainingArguments, Quick) is Quick


def test_arguments_of_another_trainer_keep_their_fields(tmp_path):
    """Also in a class that is written by hand."""

    class Both(hc.DistillationTrainer, Seq2SeqTrainer):
        pass

    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **PLAIN)
    trainer = Both(bert(), bert(1), args, train_dataset=ROWS, data_collator=pad)
    assert isinstance(trainer.args, Seq2SeqTrainingArguments)
    assert (trainer.args.predict_with_generate, trainer.args.alpha_output) == (True, 1.0)
    trainer.save_model()
    saved = json.loads((tmp_path / "training_args.json").read_text())
    assert (saved["predict_with_generate"], saved["alpha_output"]) == (True, 1.0)


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="ours must be a trainer of hf_compress, .* got Trainer"):
        hc.join_trainers(Trainer, Seq2SeqTrainer)
    with pytest.raises(ValueError, match="theirs must be a Trainer outside of hf_compress, got JointTeacherTrainer"):
        hc.join_trainers(hc.DistillationTrainer, hc.JointTeacherTrainer)


def llama(seed, layers):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip


@pytest.fixture
def trl(monkeypatch):
    found = pytest.importorskip("trl")
    # It reports its use to a server otherwise.
    monkeypatch.setenv("CI", "1")
    return found


@pytest.fixture
def texts(tokenizer, sentences):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token, eos_token=tokenizer.sep_token,
        unk_token=tokenizer.unk_token,
    )  # fmt: skip
    return fast, Dataset.from_dict({"text": [text for text, _ in sentences[:8]]})


# What it says of the outputs that it makes for metrics, and of its own imports.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_trl_distils_a_pruned_model(tmp_path, trl, texts, batches):
    tokenizer, rows = texts
    both = hc.join_trainers(hc.DistillationTrainer, trl.SFTTrainer, trl.SFTConfig)
    options = {"alpha_layer": 0.5, "gradient_checkpointing": False, "bf16": False, **PLAIN}
    teacher, students = llama(1, 4), [llama(0, 2), llama(0, 2)]
    for student in students:
        config = hc.StructuredPruningConfig(mac_ratio=0.6, seq_len=16)
        hc.compress(student, config, data=batches(student.config, count=2))
    args = both.arguments_class(str(tmp_path / "a"), **options)
    joined = both(
        students[0],
        teacher_model=teacher,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    found = weights_after(joined)
    args = hc.DistillationArguments(str(tmp_path / "b"), **options)
    given = {"train_dataset": joined.train_dataset, "data_collator": joined.data_collator}
    assert_same_weights(found, weights_after(hc.DistillationTrainer(students[1], llama(1, 4), args, **given)))
    metrics = joined.evaluate()
    assert {"eval_loss/task", "eval_loss/output", "eval_loss/layer", "eval_mean_token_accuracy"} <= metrics.keys()
    joined.save_model()
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert hc.steps_of(opened) == hc.steps_of(joined.model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_trl_puts_adapters_on_a_pruned_model_that_it_opens(tmp_path, trl, texts, batches):
    peft = pytest.importorskip("peft")
    tokenizer, rows = texts
    pruned = llama(0, 2)
    hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=0.6, seq_len=16), data=batches(pruned.config, count=2))
    pruned.save_pretrained(tmp_path / "pruned")
    both = hc.join_trainers(hc.DistillationTrainer, trl.SFTTrainer, trl.SFTConfig)
    args = both.arguments_class(str(tmp_path / "run"), gradient_checkpointing=False, bf16=False, **PLAIN)
    trainer = both(
        str(tmp_path / "pruned"), teacher_model=llama(1, 2), args=args, train_dataset=rows, processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert hc.steps_of(opened) == hc.steps_of(pruned)
    changed = [
        name for name, value in opened.state_dict().items() if not torch.equal(value, pruned.state_dict()[name])
    ]
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_are_pruned_in_a_trainer_of_trl(tmp_path, trl, texts):
    tokenizer, rows = texts
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, start_step=1, end_step=2, pruning_frequency=1)
    args = trl.SFTConfig(str(tmp_path), gradient_checkpointing=False, bf16=False, **PLAIN)
    trainer = trl.SFTTrainer(
        llama(0, 2), args=args, train_dataset=rows, processing_class=tokenizer,
        callbacks=[hc.WeightPruningCallback(config)],
    )  # fmt: skip
    trainer.train()
    weight = trainer.model.model.layers[0].self_attn.q_proj.weight
    assert float((weight == 0).float().mean()) == 0.5
