"""Labels are matched by name: whatever their order, a model's answers are compared with what they mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, pipeline

from hf_compress.cli.main import main
from hf_compress.stages.arguments import DeviceArguments
from hf_compress.stages.evaluate import Evaluate, EvaluateArguments, evaluate
from hf_compress.tasks.label_matching import match_labels
from hf_compress.tasks.sources import DataArguments, load_task
from tests.labelled_models import TEXTS, write_perfect_model, write_rows


def task_of(tmp_path, labels, suffix=".jsonl", **splits):
    files = {"train": labels, **splits}
    return load_task(
        DataArguments(
            **{
                f"{split}_file": str(
                    write_rows(
                        tmp_path / f"{split}{suffix}",
                        [{"text": TEXTS[i], "label": value} for i, value in enumerate(values)],
                    )
                )
                for split, values in files.items()
                if values is not None
            }
        )
    )


def config_of(names):
    if isinstance(names, int):
        return BertConfig(num_labels=names)
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["up", "down"], ["up", "down"], [0, 1]),
        (["up", "down"], ["down", "up"], [1, 0]),
        (["UP", "Down"], ["up", "down"], [0, 1]),
        (["not_equal", "equal"], ["Equal", "not equal"], [1, 0]),
        # Upper case matters where names differ by nothing else.
        (["a", "A"], ["A", "a"], [1, 0]),
        (["up", "down"], ["down", "even", "up"], [2, 0]),
        (["up", "down"], 2, [1, 0]),
        ([0, 1], 2, [0, 1]),
        ([0, 1], ["up", "down"], [0, 1]),
        ([1, 2, 3], ["3", "2", "1"], [2, 1, 0]),
        ([1, 2, 3], 3, [0, 1, 2]),
        ([1, 2], 3, [1, 2]),
        ([0, 2], 3, [0, 2]),
        (["1", "10", "2"], ["1", "2", "10"], [0, 2, 1]),
        (["1", "0"], 2, [1, 0]),
        (["LABEL_1", "LABEL_0"], 2, [1, 0]),
        (["LABEL_1", "LABEL_0"], ["up", "down"], [1, 0]),
        ([True, False], 2, [1, 0]),
        ([True, False], ["true", "false"], [0, 1]),
        ([True, False], ["no", "yes"], [1, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_ids_of_the_data_become_the_models(tmp_path, labels, names, expected):
    matched = match_labels(task_of(tmp_path, labels), config_of(names))
    assert matched.split("train")["label"][:] == expected


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["up", "sideways"], ["up", "down"], r"labels up, down, .*'sideways' \(train_file .*, row 2\) is none"),
        (["up", "down"], ["0", "1"], "none of the model's"),
        (["up", "down", "even"], 2, "2 labels, the task .* has 3"),
        ([0, 1], 3, "3 labels, the task .* has 2"),
        ([0, 3], 2, r"class ids 0\.\.C-1"),
        ([0, 1], ["1", "2"], "'0' .* is none of the model's"),
        (["up", "down"], ["score"], "1 label, a score"),
        ([0.5, 1.5], 2, "has scores such as 0.5"),
    ],
)
def test_what_does_not_correspond_is_refused_by_name(tmp_path, labels, names, message):
    with pytest.raises(ValueError, match=message):
        match_labels(task_of(tmp_path, labels), config_of(names))


def test_what_only_some_splits_have(tmp_path):
    # A class that validation lacks, in a file read with the training file and alone.
    both = task_of(tmp_path, ["b", "a", "c"], validation=["c", "a"])
    alone = task_of(tmp_path / "alone", None, validation=["c", "a"])
    for task in (both, alone):
        matched = match_labels(task, config_of(["c", "b", "a"]))
        assert matched.split("validation")["label"][:] == [0, 2]
    with pytest.raises(ValueError, match="have no names to match"):
        match_labels(alone, config_of(3))


def test_numbers_are_read_as_the_model_needs_them(tmp_path):
    scores = match_labels(task_of(tmp_path, [3, 0, 5]), config_of(1))
    assert scores.is_regression
    assert scores.split("train")["label"][:] == [3.0, 0.0, 5.0]
    classes = match_labels(task_of(tmp_path, [1.0, 0.0]), config_of(["no", "yes"]))
    assert classes.split("train")["label"][:] == [1, 0]
    assert classes.label_names == ("no", "yes")


def test_matching_a_matched_task_changes_nothing(tmp_path):
    for labels, names in ((["up", "down"], ["up", "down"]), ([0, 1], ["up", "down"]), (["up", "down"], 2)):
        config = config_of(names)
        once = match_labels(task_of(tmp_path, labels), config)
        twice = match_labels(once, config)
        assert twice.order == once.order
        assert twice.split("train")["label"][:] == once.split("train")["label"][:]


def test_text_labels_that_meet_a_model_without_names_are_told(tmp_path, caplog):
    match_labels(task_of(tmp_path, ["up", "down"]), config_of(2))
    assert "0 is down, 1 is up" in caplog.text


def test_logits_come_back_in_the_order_of_the_files(tmp_path):
    task = match_labels(task_of(tmp_path, ["b", "a"]), config_of(["c", "b", "a"]))
    logits, labels = task.in_own_order(np.array([[0.0, 1.0, 2.0]] * 2), np.array([1, 2]))
    # a, b, then what only the model has.
    assert logits.tolist() == [[2.0, 1.0, 0.0]] * 2
    assert labels.tolist() == [1, 0]


@pytest.fixture
def perfect(tmp_path, monkeypatch):
    """Models that answer all texts rightly, in two orders of labels, and the texts with the names as labels."""
    monkeypatch.chdir(tmp_path)
    answers = write_perfect_model(tmp_path / "model", ["up", "down"])
    assert answers == write_perfect_model(tmp_path / "unnamed", None)
    names = [("up", "down")[answer] for answer in answers]
    rows = [{"utterance": text, "intent": name} for text, name in zip(TEXTS, names, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.tsv", rows)
    return names


def measured(model):
    data, device = DataArguments(data_dir="data", max_length=16), DeviceArguments("cpu")
    return evaluate(Evaluate(evaluation=EvaluateArguments([model]), data=data, device=device))[model]


TRAINING = "--data_dir data --max_length 16 --use_cpu --max_steps 1 --save_strategy no --output_dir out"


@pytest.mark.parametrize(
    "line",
    [
        f"finetune --model_name_or_path model {TRAINING} --learning_rate 0",
        f"distill --model_name_or_path model --teacher_name_or_path model {TRAINING} --learning_rate 0",
        f"prune-weights --model_name_or_path model {TRAINING} --do_prune false --learning_rate 0",
        "prune-structure --model_name_or_path model --data_dir data --output_dir out --mac_ratio 1 --device cpu "
        "--calibration_samples 48 --selection fisher --correction false --max_length 16",
    ],
    ids=lambda line: line.split()[0],
)
@pytest.mark.filterwarnings("ignore")
def test_a_perfect_model_is_perfect_in_every_command(perfect, tmp_path, line):
    assert main(line.split()) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    if "eval_split" in results:
        assert (results["eval_accuracy"], results["eval_split"]) == (1.0, "validation")
    found = measured("out")
    assert found["accuracy"] == found["f1"] == 1.0
    answers = pipeline("text-classification", model="out", tokenizer="out", device="cpu")(TEXTS)
    assert [answer["label"] for answer in answers] == perfect


@pytest.mark.filterwarnings("ignore")
def test_the_positive_class_is_the_datas(perfect, tmp_path):
    # Wrong answers, so that F1 of one class is not that of the other.
    rows = [{"text": text, "label": perfect[i // 2]} for i, text in enumerate(TEXTS)]
    write_rows(tmp_path / "data" / "validation.tsv", rows)
    (tmp_path / "data" / "train.tsv").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "up", "1": "down"}
    found = measured("model")
    pairs = [(perfect[i // 2] == "up", answer == "up") for i, answer in enumerate(perfect)]
    hits = sum(said and is_so for is_so, said in pairs)
    assert found["f1"] == pytest.approx(2 * hits / (sum(a for a, _ in pairs) + sum(b for _, b in pairs)))


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_names_learns_them(perfect, tmp_path):
    assert main(f"finetune --model_name_or_path unnamed {TRAINING} --learning_rate 0".split()) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "down", "1": "up"}


@pytest.mark.parametrize("student", ["model", "unnamed"])
@pytest.mark.filterwarnings("ignore")
def test_a_teacher_in_another_order_teaches_the_same(perfect, tmp_path, capsys, student):
    """The student without names takes those of the data, down and up; each teacher has the other order."""
    teacher = {"model": "turned", "unnamed": "model"}[student]
    for place in ("turned", "unnamed"):
        write_perfect_model(tmp_path / place, ["down", "up"] if place == "turned" else None)
        weights = load_file(tmp_path / place / "model.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name].flip(0).contiguous()
        save_file(weights, tmp_path / place / "model.safetensors", metadata={"format": "pt"})
    options = f"--model_name_or_path {student} --teacher_name_or_path {teacher} {TRAINING} --learning_rate 0"
    assert main(f"distill {options} --alpha_task 0".split()) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["eval_accuracy"] == 1.0
    # Equal functions: the student has nothing to learn from its teacher.
    assert abs(results["train_loss"]) < 1e-6
    # A teacher that learns shares the ids of the student's labels.
    assert main(f"joint-distill {options}".replace("--output_dir out", "--output_dir joint").split()) == 2
    assert "must count its labels as the student does" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "joint" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_new_students_head_has_its_teachers_labels(perfect, tmp_path):
    write_perfect_model(tmp_path / "student", None)
    strip_head(tmp_path / "student")
    line = f"distill --model_name_or_path student --teacher_name_or_path model {TRAINING} --learning_rate 0"
    assert main(line.split()) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "up", "1": "down"}
    # F1 is that of the data's class 1, not of the model's.
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["eval_f1"] == pytest.approx(measured("out")["f1"])


@pytest.mark.filterwarnings("ignore")
def test_labels_that_training_never_sees(perfect, tmp_path, capsys):
    rows = [{"text": TEXTS[0], "label": "up"}, {"text": TEXTS[1], "label": "sideways"}]
    write_rows(tmp_path / "data" / "validation.tsv", [{"utterance": r["text"], "intent": r["label"]} for r in rows])
    for headed in (True, False):
        if not headed:
            strip_head(tmp_path / "model")
        assert main(f"finetune --model_name_or_path model {TRAINING}".split()) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "'sideways'" in last
        assert "row 2" in last


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "c"] * 16, ["a", "b", "c"]),
        ([3, 1, 2] * 16, ["1", "2", "3"]),
        ([2, 0, 1] * 16, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["true", "false"] * 24, ["False", "True"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_new_head_takes_the_names_of_the_data(perfect, tmp_path, labels, names):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.tsv", rows)
    command = f"finetune --model_name_or_path model {TRAINING}"
    strip_head(tmp_path / "model")
    assert main(command.split()) == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert list(found.values()) == names
    answers = pipeline("text-classification", model="out", tokenizer="out", device="cpu")(TEXTS)
    right = [a["label"].removeprefix("LABEL_").lower() == str(r).lower() for a, r in zip(answers, labels, strict=True)]
    assert measured("out")["accuracy"] == pytest.approx(np.mean(right))


def strip_head(folder):
    """What an encoder's folder holds."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("id2label", None), config.pop("label2id", None)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
def test_f1_says_of_which_class_it_is(perfect, tmp_path, capsys):
    assert measured("model")["positive_class"] == "up"
    assert main(["evaluate", "--models", "model", "--data_dir", "data", "--max_length", "16", "--device", "cpu"]) == 0
    assert "1.0000  (of the class 'up')" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("f1 ")
    )
