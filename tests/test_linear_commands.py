"""`hf-compress linearize`, `joint-distill` and `snapshot-distill`, on a tiny encoder and generated sentences."""

import copy
import json
import re
import runpy
import shutil
from pathlib import Path

import pandas
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.stages import training
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.joint_teacher import JointTeacherTrainer
from tests.rounding import assert_equal_to_rounding


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cald_linear_attention.py"
TINY = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TRAINING = "--data_dir data --max_length 16 --use_cpu --disable_tqdm true --per_device_train_batch_size 16"
LINEARIZE = "linearize --model_name_or_path model --output_dir out --projected_length 4"
JOINT = f"joint-distill --model_name_or_path start --teacher_name_or_path pretrained --output_dir out {TRAINING}"
SNAPSHOTS = (
    f"snapshot-distill --model_name_or_path start --teacher_snapshots dense/checkpoint-* --output_dir out {TRAINING}"
)
TRAIN = "--num_train_epochs 2 --learning_rate 1e-3 --alpha_layer 1"


def classifier(**options):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**TINY, **options}))


@pytest.fixture(scope="module")
def place(sentences, tokenizer, tmp_path_factory):
    """A folder with an encoder, a classifier, its snapshots, a linear student, and things that fit none of them."""
    root = tmp_path_factory.mktemp("linear")
    encoder = classifier().bert
    # As many pretrained encoders are: the pooler belongs to the head, and is as new as that.
    encoder.pooler = None
    models = {
        "model": classifier(),
        "pretrained": encoder,
        "three": classifier(num_labels=3),
        "deep": classifier(num_hidden_layers=3),
        "dense/checkpoint-4": classifier(initializer_range=0.03),
        "dense/checkpoint-12": classifier(initializer_range=0.05),
        "snapshots3/epoch_1": classifier(num_labels=3),
        "uneven/epoch_1": classifier(),
        "uneven/epoch_2": classifier(num_hidden_layers=3),
        "mixed/epoch_1": classifier(),
        "mixed/best": classifier(),
        "cut/epoch_1": classifier(),
        "start": hc.compress(classifier(), hc.LinformerConfig(projected_length=4)),
        "pruned": hc.compress(classifier(), hc.TokenPruningConfig()),
        "gpt2": GPT2ForSequenceClassification(
            GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    weights = root / "cut" / "epoch_1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("weightless", "unnamed"):
        shutil.copytree(root / "model", root / name / "epoch_1")
    (root / "weightless" / "epoch_1" / "model.safetensors").unlink()
    (root / "unnamed" / "epoch_1" / "config.json").unlink()
    (root / "file").write_text("a file, not a folder")
    (root / "data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(root / "data" / f"{name}.parquet")
    return root


@pytest.fixture
def inside(place, tmp_path, monkeypatch):
    """Commands run in a folder of this test's own, beside the models."""
    for found in place.iterdir():
        (tmp_path / found.name).symlink_to(found)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(monkeypatch):
    """The models that a command has saved, as they were in memory."""
    models = []

    def keep(directory, model, *args, real=training.save_stage):
        models.append(copy.deepcopy(model).eval())
        real(directory, model, *args)

    monkeypatch.setattr(training, "save_stage", keep)
    return models


def logits(model, tokenizer):
    batch = tokenizer(["good film", "a very bad story was the plot"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def reopened(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(("flags", "fields"), [
    ("--share kv", {"share": "kv", "initialization": "pooling", "length_scaling": False, "slot_mask": True}),
    ("--initialization normal", {}),
    ("--initialization normal --slot_mask true", {"slot_mask": True}),
    ("--share layer --initialization pooling --length_scaling false --slot_mask true --max_tokens 48",
     {"share": "layer", "initialization": "pooling", "length_scaling": False, "slot_mask": True, "max_tokens": 48}),
], ids=["default", "published", "published but masked", "pooling"])  # fmt: skip
def test_linearize(inside, tokenizer, capsys, flags, fields):
    assert main(f"{LINEARIZE} {flags} --seed 3".split()) == 0
    printed = capsys.readouterr().out
    expected = hc.compress(reopened("model"), hc.LinformerConfig(projected_length=4, seed=3, **fields))
    linear = reopened("out")
    assert hc.steps_of(linear) == hc.steps_of(expected)
    (step,) = hc.steps_of(linear)
    assert {name: step[name] for name in fields} == fields
    assert_equal_to_rounding(logits(linear, tokenizer), logits(expected, tokenizer))
    assert AutoTokenizer.from_pretrained("out").model_max_length == step["max_tokens"] == fields.get("max_tokens", 32)
    results = json.loads(Path("out/results.json").read_text())
    assert results["params"] == {"before": reopened("model").num_parameters(), "after": linear.num_parameters()}
    assert f"-> {linear.num_parameters():,d}" in printed
    assert results["mac_ratio_by_length"]["512"] < 1
    assert f"512 tokens: {results['mac_ratio_by_length']['512']:.3f} of the dense arithmetic" in printed


@pytest.mark.slow
def test_linearize_measures_the_texts_of_the_task(inside, capsys, caplog):
    """The data's own lengths decide whether linear attention pays, not round numbers."""
    for slots, pays in (("2", True), ("16", False)):
        caplog.clear()
        line = f"linearize --model_name_or_path model --data_dir data --output_dir s{slots} --projected_length {slots}"
        assert main(line.split()) == 0
        texts = json.loads(Path(f"s{slots}/results.json").read_text())["texts"]
        rows = pandas.read_parquet("data/train.parquet")["sentence"].tolist()
        lengths = [len(ids) for ids in AutoTokenizer.from_pretrained("model")(rows)["input_ids"]]
        macs = {
            name: sum(hc.count_cost(reopened(name), length).macs for length in lengths)
            for name in ("model", f"s{slots}")
        }
        assert texts["mac_ratio"] == pytest.approx(macs[f"s{slots}"] / macs["model"], rel=1e-9)
        assert texts["longest_tokens"] == max(lengths)
        assert min(lengths) <= texts["median_tokens"] <= max(lengths)
        assert f"{texts['mac_ratio']:.3f} of the dense arithmetic" in capsys.readouterr().out
        assert (texts["mac_ratio"] < 1) is pays
        assert ("costs more than it saves" in caplog.text) is not pays


def test_linearize_a_pretrained_encoder(inside):
    """The head that it gets is the task's, and the same for the same seed."""
    line = LINEARIZE.replace("path model", "path pretrained") + " --data_dir data"
    assert main(line.split()) == 0
    first = reopened("out")
    assert main(line.replace("dir out", "dir again").split()) == 0
    assert first.config.num_labels == 2
    assert torch.equal(first.classifier.weight, reopened("again").classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, reopened("model").get_input_embeddings().weight)


@pytest.mark.parametrize("line", [JOINT, SNAPSHOTS], ids=["joint", "snapshots"])
def test_guided_training(inside, saved, tokenizer, capsys, line):
    assert main(f"{line} {TRAIN}".split()) == 0
    printed = capsys.readouterr().out
    student, start = reopened("out"), reopened("start")
    assert hc.steps_of(student) == hc.steps_of(start)
    assert_equal_to_rounding(logits(student, tokenizer), logits(saved[0], tokenizer))
    for (name, before), after in zip(start.named_parameters(), student.parameters(), strict=True):
        untouched = "position_embeddings" in name or "token_type" in name or name.endswith("projection.keys")
        assert untouched or not torch.equal(before, after), name
    results = json.loads(Path("out/results.json").read_text())
    for name in ("eval_accuracy", "eval_loss/layer", "eval_loss/output", "train_loss"):
        assert re.search(rf"^{name} +{results[name]:.4f}$", printed, re.M), name
    assert "saved to out" in printed
    assert Path("out/teacher").exists() == (line == JOINT)
    if line == JOINT:
        teacher = reopened("out/teacher")
        assert hc.steps_of(teacher) == []
        assert not torch.equal(teacher.classifier.weight, start.classifier.weight)
        assert AutoTokenizer.from_pretrained("out/teacher").get_vocab() == tokenizer.get_vocab()


def test_a_joint_teacher_without_head_gets_the_students(inside, monkeypatch):
    seen = []

    def keep(self, model, *args, real=JointTeacherTrainer.make_teacher):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(self, model, *args)

    monkeypatch.setattr(JointTeacherTrainer, "make_teacher", keep)
    assert main(f"{JOINT} --max_steps 1 --save_teacher false --save_strategy no".split()) == 0
    student = reopened("start").state_dict()
    for name in ("classifier", "bert.pooler.dense"):
        assert torch.equal(seen[0][f"{name}.weight"], student[f"{name}.weight"])
        assert torch.equal(seen[0][f"{name}.bias"], student[f"{name}.bias"])
    assert not Path("out/teacher").exists()


@pytest.mark.parametrize("line", [JOINT, SNAPSHOTS], ids=["joint", "snapshots"])
def test_an_interrupted_command_goes_on(inside, monkeypatch, capsys, line):
    line += f" {TRAIN} --save_strategy steps --save_steps 3"
    assert main(line.replace("dir out", "dir whole").split()) == 0

    def dying(self, *args, real=DistillationTrainer.training_step, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", dying)
        assert main(line.split()) == 130
    assert not Path("out/model.safetensors").exists()
    assert Path("out/checkpoint-3").is_dir()
    assert main([*line.split(), "--resume_from_checkpoint", "true"]) == 0
    for folder in ("", "/teacher") if line.startswith("joint") else ("",):
        whole, resumed = (reopened(f"{name}{folder}").state_dict() for name in ("whole", "out"))
        assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    if line.startswith("snapshot"):
        # A checkpoint of the other kind of training has no teacher that could go on learning.
        assert (
            main(f"{JOINT} {TRAIN} --resume_from_checkpoint out/checkpoint-8".replace("dir out", "dir x").split()) == 2
        )
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search("resume_from_checkpoint must hold the teacher", last), last


def test_guidance_that_ends_before_the_training_does(inside):
    """Hybrid guidance by saved states: the last part of the training logs the task alone."""
    assert main(f"{SNAPSHOTS} {TRAIN} --max_distill_steps 3 --max_steps 5 --logging_steps 1".split()) == 0
    state = json.loads(Path("out/checkpoint-5/trainer_state.json").read_text())
    logged = ["loss/layer" in entry for entry in state["log_history"] if "loss" in entry]
    assert logged == [True] * 3 + [False] * 2


LONG = TRAINING.replace("--max_length 16", "--max_length 48")


def test_documents_longer_than_pretrained(inside, capsys):
    """The whole way of a long task: a longer teacher, a student made from it, and both kinds of guidance."""
    texts = [(" ".join(["good film the very bad story was plot"] * 8), n % 2) for n in range(32)]
    (inside / "long").mkdir()
    for name in ("train", "test"):
        pandas.DataFrame(texts, columns=["sentence", "label"]).to_parquet(inside / "long" / f"{name}.parquet")
    flags = f"{LONG} --num_train_epochs 1 --save_strategy no".replace("data_dir data", "data_dir long")
    finetune_it = f"finetune --model_name_or_path model {flags} --output_dir longer"
    assert main(finetune_it.split()) == 2
    assert (
        "max_length must be at most the model's 32 positions, got 48 and examples of 48 tokens"
        in capsys.readouterr().err
    )
    assert main(f"{finetune_it} --max_positions 48".split()) == 0
    # A task without validation split is measured on its test split.
    assert "eval_accuracy" in capsys.readouterr().out
    longer = reopened("longer")
    assert longer.config.max_position_embeddings == 48
    assert AutoTokenizer.from_pretrained("longer").model_max_length == 48
    assert (
        main(["linearize", "--model_name_or_path", "longer", "--output_dir", "linear", "--projected_length", "4"]) == 0
    )
    student = f"--model_name_or_path linear {flags} --alpha_layer 1"
    assert main(f"distill {student} --teacher_name_or_path longer --output_dir target".split()) == 0
    # The teacher that learns beside its student gets the positions with it.
    joint = f"joint-distill {student} --teacher_name_or_path model --output_dir joint"
    assert main(joint.split()) == 0
    assert reopened("joint/teacher").config.max_position_embeddings == 48
    assert main(f"distill {student} --teacher_name_or_path model --output_dir short".split()) == 2
    assert "The teacher must read inputs of 48 tokens, got one that reads 32" in capsys.readouterr().err


def test_teachers_without_tokenizer_read_the_students_tokens(inside, caplog):
    for name in ("checkpoint-4", "checkpoint-12"):
        reopened(f"dense/{name}").save_pretrained(f"bare/{name}")
    line = SNAPSHOTS.replace("dense/", "bare/")
    with caplog.at_level("INFO", "hf_compress"):
        assert main(f"{line} {TRAIN} --save_strategy no".split()) == 0
    assert "has no tokenizer: it reads the student's tokens" in caplog.text
    assert main(f"{SNAPSHOTS} {TRAIN} --save_strategy no".replace("dir out", "dir out2").split()) == 0
    one, other = reopened("out").state_dict(), reopened("out2").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_teacher_with_other_tokens_keeps_its_tokenizer(inside, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["otherword"])
    wide = classifier(vocab_size=128)
    wide.save_pretrained("wide")
    other.save_pretrained("wide")
    assert main(f"{JOINT} {TRAIN} --save_strategy no".replace("path pretrained", "path wide").split()) == 0
    assert "otherword" in AutoTokenizer.from_pretrained("out/teacher").get_vocab()
    assert "otherword" not in AutoTokenizer.from_pretrained("out").get_vocab()


def test_not_resuming_can_be_said(inside):
    assert main(f"{JOINT} {TRAIN} --save_strategy no --resume_from_checkpoint false".split()) == 0


def test_a_single_snapshot_is_called_a_fixed_teacher(inside, caplog):
    line = SNAPSHOTS.replace("dense/checkpoint-*", "dense/checkpoint-4")
    assert main(f"{line} {TRAIN} --save_strategy no".split()) == 0
    assert "teacher_snapshots holds one state, dense/checkpoint-4: that is a fixed teacher" in caplog.text


@pytest.mark.parametrize("mode", [
    "unguided", "trajectory --compat cald", "waypoint --snapshots dense/checkpoint-*", "target --teacher model",
    "hybrid --teacher model --student_reinit",
])  # fmt: skip
def test_the_example(inside, monkeypatch, capsys, mode):
    shutil.copytree(inside / "data", inside / "test_only")
    (inside / "test_only" / "validation.parquet").rename(inside / "test_only" / "test.parquet")
    flags = f"--mode {mode} --model model --data_dir test_only --max_length 16 --slots 4 --max_steps 2 --out out"
    monkeypatch.setattr("sys.argv", ["example", *flags.split()])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert re.search(rf"{mode.split()[0]} .*'accuracy': 0\.\d", capsys.readouterr().out)
    assert [step["method"] for step in hc.steps_of(reopened("out"))] == ["linformer"]


POOLING = f"{LINEARIZE} --initialization pooling"
CASES = [
    (f"{LINEARIZE} --projected_length 0", "projected_length must be at least 1, got 0"),
    (f"{LINEARIZE} --projected_length many", "projected_length.*'many'"),
    (f"{LINEARIZE} --projected_lenght 8", "'projected_lenght' is not an option. Did you mean 'projected_length'"),
    (f"{LINEARIZE} --share head", "share: invalid choice: 'head'.*none.*kv.*layer"),
    (f"{LINEARIZE} --initialization ones", "initialization: invalid choice: 'ones'"),
    (f"{LINEARIZE} --max_length 16", "max_length must be left out, got 16: .*max_tokens says how long"),
    (f"{LINEARIZE} --freeze_embeddings", "freeze_embeddings must be left out, got True: linearize trains nothing"),
    (f"{LINEARIZE} --max_positions 16", "max_positions must be at least the model's 32 tokens, got 16"),
    (f"{LINEARIZE} --max_tokens 0", "max_tokens must be at least 1, got 0"),
    (f"{LINEARIZE} --slot_stride 0", "slot_stride must be at least 1, got 0"),
    (f"{LINEARIZE} --initialization normal --slot_stride 2", "slot_stride must go with initialization='pooling'"),
    (f"{POOLING} --slot_stride 2", "slot_stride must be at least 8 for 32 tokens and 4 slots, got 2"),
    (f"{LINEARIZE} --slot_mask perhaps", "slot_mask.*'perhaps'|Truthy value.*perhaps"),
    (f"{LINEARIZE} --seed 99999999999999999999", "seed must be in 0.*got 99999999999999999999"),
    (f"{LINEARIZE} --seed -1", "seed must be in 0.*got -1"),
    (LINEARIZE.replace("path model", "path gpt2"), "bidirectional encoder|model_type must be one of"),
    (LINEARIZE.replace("path model", "path start"), "must not repeat linformer"),
    (LINEARIZE.replace("path model", "path pruned"), "ordinary layers"),
    (LINEARIZE.replace("path model", "path nowhere"), "No classifier can be opened at 'nowhere'"),
    (LINEARIZE.replace("path model", "path three") + " --data_dir data", "3 labels, the task 'data' has 2"),
    (LINEARIZE.replace("--output_dir out", ""), "required: --output_dir"),
    (LINEARIZE.replace("dir out", "dir file"), "output_dir 'file' cannot be"),
    (JOINT.replace("--teacher_name_or_path pretrained", ""), "arguments are required: --teacher_name_or_path$"),
    (JOINT.replace("path pretrained", "path nowhere"), "No classifier can be opened at 'nowhere'"),
    (JOINT.replace("path pretrained", "path three"), "3 labels, the task 'data' has 2"),
    (f"{JOINT} --teacher_learning_rate -1", "teacher_learning_rate must be zero or positive, got -1"),
    (f"{JOINT} --teacher_learning_rate nan", "teacher_learning_rate must be zero or positive, got nan"),
    (f"{JOINT} --teacher_update_cycle 0", "teacher_update_cycle must be at least 1, got 0"),
    (f"{JOINT} --teacher_schedule fast", "teacher_schedule.*invalid choice: 'fast'"),
    (f"{JOINT} --teacher_cache_dir cache", "teacher_cache_dir must be unset: a learning teacher"),
    (f"{JOINT} --label_smoothing_factor 0.1", "label_smoothing_factor must be 0.*got 0.1"),
    (f"{JOINT} --lr_scheduler_type reduce_lr_on_plateau --eval_strategy epoch", "lr_scheduler_type must not depend"),
    (f"{JOINT} --max_positions 64", "max_positions must be unset for linear attention made for 32 tokens, got 64"),
    (f"{JOINT} --compat cald --layer_map 0 1", "layer_map must be left out or None with compat='cald'"),
    (f"{JOINT} --max_distill_steps -1", "max_distill_steps must not be negative, got -1"),
    (f"{JOINT} --max_distill_steps 2 --alpha_task 0", "alpha_task must be above 0 with max_distill_steps"),
    (f"{JOINT} --alpha_layer nan", "alpha_layer must be zero or positive, got nan"),
    (f"{JOINT} --alpha_task 0 --alpha_output 0", "alpha_task, alpha_output and alpha_layer must not all be 0"),
    (f"{JOINT} --compat paper", "compat.*'paper'"),
    (f"{JOINT} --alpha_layer 1 --layer_map 0 7", "layer_map must hold teacher layers 0..1.*7"),
    (JOINT.replace("path pretrained", "path deep") + " --alpha_layer 1 --compat cald", "must have equally deep"),
    (f"{JOINT} --resume_from_checkpoint dense/checkpoint-4", "must be true or a checkpoint folder, got 'dense"),
    (f"{JOINT} --teacher_snapshots dense", "'teacher_snapshots' is not an option"),
    (SNAPSHOTS.replace("--teacher_snapshots dense/checkpoint-*", ""), "teacher_snapshots must match.*got nothing"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "dense/epoch-*"), "teacher_snapshots must match.*dense/epoch"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "dense"), "teacher_snapshots must be saved models, got 'dense' without"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "unnamed/*"), "got 'unnamed/epoch_1' without a config.json"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "weightless/*"), "got 'weightless/epoch_1' without weights"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "cut/*"), "teacher_snapshots must be saved models, got 'cut/epoch_1'"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "mixed/*"), "teacher_snapshots must all end in a number or none"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "uneven/*"), "teacher_snapshots must be states of one model"),
    (SNAPSHOTS.replace("dense/checkpoint-*", "snapshots3/*"), "must have the student's 2 labels, got 3"),
    (f"{SNAPSHOTS} --max_steps 1", "teacher_snapshots must be at most the 1 updates of the training, got 2"),
    (f"{SNAPSHOTS} --teacher_cache_dir cache", "teacher_cache_dir must be unset: it holds the outputs of one teacher"),
    (f"{SNAPSHOTS} --max_distill_steps -1", "max_distill_steps must not be negative, got -1"),
    (f"{SNAPSHOTS} --max_distill_steps 1.5", "max_distill_steps.*1.5"),
    (f"{SNAPSHOTS} --alpha_output -1", "alpha_output must be zero or positive, got -1"),
    (f"{SNAPSHOTS} --teacher_name_or_path model", "'teacher_name_or_path' is not an option"),
    (SNAPSHOTS.replace("path start", "path nowhere"), "can be opened at 'nowhere'"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("line", "expected"), CASES, ids=[f"{i:02d}" for i in range(len(CASES))])
def test_bad_input(inside, capsys, line, expected):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("hf-compress: ")
    assert re.search(expected, last), last
    assert "Traceback" not in captured.err
    assert not Path("out/model.safetensors").exists()
