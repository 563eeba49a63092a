"""Every bad recipe is one line on standard error and exit code 2 before anything starts, and nothing is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hf_compress.cli.main import main
from tests.file_trees import tree
from tests.recipe_files import LINEAR, PRUNED, RECOVERED, TEACHER, UNTRAINED, write_place, write_recipe


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    write_place(root)
    (root / "empty.txt").write_text("\n")
    before = os.getcwd()
    os.chdir(root)
    yield root
    os.chdir(before)


def bad(*stages, says, **shared):
    return stages, shared, says


MISTAKES = {
    "stage-unknown": bad({**TEACHER, "stage": "finetun"}, says="'finetun'. Did you mean 'finetune'?"),
    "stage-none": bad({"name": "teacher"}, says="stage 1 must be lines such as"),
    "stage-demo": bad({"stage": "demo"}, says="stage must be one of"),
    "stages-none": bad(says="stages must be a list with at least one stage"),
    "option-unknown": bad(TEACHER, {**PRUNED, "mac_ration": 0.5}, says="'mac_ration' is not an option. Did you mean"),
    "option-of-another": bad({**TEACHER, "mac_ratio": 0.5}, says="stage 'teacher': 'mac_ratio' is not an option"),
    "option-empty": bad({**TEACHER, "seed": None}, says="seed has no value"),
    "option-output": bad({**TEACHER, "output_dir": "x"}, says="output_dir must be left out: each stage is saved"),
    "option-resume": bad({**TEACHER, "resume_from_checkpoint": "true"}, says="goes on by itself"),
    "option-type": bad({**TEACHER, "learning_rate": "fast"}, says="stage 'teacher'.*learning_rate.*'fast'"),
    "option-range": bad({**TEACHER, "max_length": 1}, says="max_length must be at least 2, got 1"),
    "shared-unknown": bad(TEACHER, sede=3, says="'sede' is not an option. Did you mean 'seed'?"),
    "shared-unused": bad(TEACHER, mac_ratio=0.5, says="no stage of the recipe has the option 'mac_ratio'"),
    "shared-empty": bad(TEACHER, seed=[], says="seed has no value"),
    "output-none": bad(TEACHER, output_dir=None, says="output_dir must name the folder"),
    "output-file": bad(TEACHER, output_dir="data/train.tsv", says="cannot be written"),
    "output-disk": bad({**TEACHER, "save_total_limit": 10**9}, says="must have room for about .* GB, got .* GB"),
    "output-foreign-note": bad({**TEACHER, "name": "strange"}, output_dir=".", says="no recipe wrote .stage.json."),
    "output-foreign": bad({**TEACHER, "name": "data"}, output_dir=".", says="holds files that no recipe wrote"),
    "name-twice": bad(TEACHER, TEACHER, says="two stages are called 'teacher'"),
    "name-path": bad({**TEACHER, "name": "../x"}, says="must be a word of letters"),
    "name-base": bad({**TEACHER, "name": "base"}, says="and not 'base'"),
    "model-none": bad({"stage": "finetune"}, says="model_name_or_path"),
    "model-absent": bad({**TEACHER, "model_name_or_path": "nowhere"}, says="there is no folder 'nowhere' here"),
    "model-near-miss": bad(TEACHER, {**PRUNED, "model_name_or_path": "techer"}, says="Did you mean 'teacher'?"),
    "base-none": bad(TEACHER, model_name_or_path=None, says="but the recipe has no model_name_or_path"),
    "untrained-export": bad(
        {"stage": "export", "model_name_or_path": "base"}, **UNTRAINED, says="one that was trained for the task"
    ),
    "no-model-saved": bad(
        TEACHER, {"stage": "evaluate", "name": "scores", "models": ["teacher"]},
        {**PRUNED, "model_name_or_path": "scores"}, says="evaluate saves no model",
    ),
    "exported-start": bad(
        TEACHER, {"stage": "export", "model_name_or_path": "teacher"}, {**PRUNED, "model_name_or_path": "export"},
        says="export saves a model that can only be measured",
    ),
    "exported-float": bad(
        TEACHER, {"stage": "export", "model_name_or_path": "teacher"},
        {"stage": "report", "models": ["teacher", "export/model_int8.onnx"]}, says="with int8: true only",
    ),
    "exported-file": bad(
        TEACHER, {"stage": "export", "model_name_or_path": "teacher"},
        {"stage": "report", "models": ["teacher", "export/small.onnx"]}, says="name the stage, or export/model_int8",
    ),
    "cycle": bad(
        {**TEACHER, "model_name_or_path": "pruned"}, PRUNED, says="must not need each other, got teacher -> pruned"
    ),
    "cycle-of-one": bad({**TEACHER, "model_name_or_path": "teacher"}, says="got teacher -> teacher"),
    "later": bad(PRUNED, TEACHER, says="needs 'teacher', which comes later"),
    "data-none": bad(TEACHER, data_dir=None, says="must say where the examples are"),
    "data-absent": bad(TEACHER, data_dir="nowhere", says="data_dir must be a folder, got 'nowhere'"),
    "data-columns": bad(TEACHER, data_dir="untold", says="untold/train.tsv"),
    "data-unmeasured": bad(
        TEACHER, {"stage": "report", "models": ["teacher"], "data_dir": "unmeasured"}, says="neither a validation nor"
    ),
    "data-samples": bad(TEACHER, {**PRUNED, "calibration_samples": 65}, says="calibration_samples must be in 1..64"),
    "windows": bad(
        {"stage": "proximal", "teacher_name_or_path": "base", "student_layers": 1, "compat": "prokt",
         "gradient_accumulation_steps": 3}, says="must divide the 4 batches of an epoch",
    ),
    "corpus-absent": bad(
        TEACHER, {"stage": "prune-vocabulary", "model_name_or_path": "teacher", "corpus": ["none.txt"]},
        says="stage 'vocabulary_pruning': corpus 'none.txt' must exist",
    ),
    "corpus-empty": bad(
        TEACHER, {"stage": "prune-vocabulary", "model_name_or_path": "teacher", "corpus": ["empty.txt"]},
        says="must hold at least one text",
    ),
    "corpus-none": bad(
        TEACHER, {"stage": "prune-vocabulary", "model_name_or_path": "teacher"}, says="must name files of texts"
    ),
    "data-lengths": bad(TEACHER, max_length=64, says="max_length must be at most 32"),
    "labels": bad({**TEACHER, "model_name_or_path": "three"}, says="'three' does not fit the data"),
    "untrained": bad(
        {**PRUNED, "model_name_or_path": "base"}, **UNTRAINED, says="must be one that was trained for the task"
    ),
    "untrained-teacher": bad(
        {**TEACHER, "stage": "distill", "teacher_name_or_path": "base"}, says="teacher_name_or_path must be one that"
    ),
    "budget": bad(TEACHER, {**PRUNED, "mac_ratio": 0.01}, says="mac_ratio"),
    "budget-range": bad(TEACHER, {**PRUNED, "mac_ratio": 1.5}, says="mac_ratio must be"),
    "order": bad(
        LINEAR, {**LINEAR, "name": "again", "model_name_or_path": "linear"}, **UNTRAINED, says="not repeat linformer"
    ),
    "order-of-two": bad(
        LINEAR, {"stage": "token_pruning", "model_name_or_path": "linear"}, says="cannot follow linformer"
    ),
    "layers": bad(
        TEACHER, {"stage": "distill", "teacher_name_or_path": "teacher", "student_layers": 3}, says="student_layers"
    ),
    "family-twice": bad(TEACHER, {**PRUNED, "mac_ratio": [0.5, 0.5]}, says="mac_ratio must have different values"),
    "target-list": bad(TEACHER, target=[1], says="target must be lines such as 'max_drop: 1.0'"),
    "target-name": bad(TEACHER, target={"max_drops": 1}, says="not an option. Did you mean 'max_drop'?"),
    "target-among": bad(TEACHER, target={"dense": "teacher", "max_drop": 1}, says="among must name the stages"),
    "target-dense": bad(TEACHER, target={"among": "teacher", "max_drop": 1}, says="dense must name the model"),
    "target-drop": bad(
        TEACHER, target={"dense": "teacher", "among": "teacher", "max_drop": -1}, says="max_drop must be a number"
    ),
    "target-metric": bad(
        TEACHER, PRUNED, target={"dense": "teacher", "among": "pruned", "max_drop": 1, "metric": "f1"},
        says="metric must be the task's main one, accuracy, got 'f1'",
    ),
    "family-of-words": bad(TEACHER, {**PRUNED, "mac_ratio": [0.5, "half"]}, says="stage 'pruned-half'.*'half'"),
}  # fmt: skip


def refused(command, capsys, says):
    files = tree()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(says, err), err
    assert len([line for line in err.splitlines() if line.startswith("hf-compress: ")]) == 1
    assert tree() == files


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_recipe(name, capsys):
    stages, shared, says = MISTAKES[name]
    refused(["run", write_recipe(Path("recipe.yaml"), *stages, **shared)], capsys, says)


@pytest.mark.parametrize(("line", "says"), [
    ("", "must be given a recipe"), ("nowhere.yaml", "must be a readable YAML file"), ("data", "Is a directory"),
    ("list.yaml", "'name: value' lines"), ("twice.yaml", "output_dir occurs twice"), ("cut.yaml", "not valid YAML"),
    ("good.yaml good.yaml", "takes one recipe"), ("good.yaml --seed", "seed is empty"),
    ("good.yaml --sede 3", "Did you mean 'seed'"), ("good.yaml --seed 1 --seed 2", "seed is given twice"),
    ("good.yaml --seed {}", "seed must be text"),
])  # fmt: skip
def test_bad_command(place, line, says, capsys):
    write_recipe(place / "good.yaml", TEACHER)
    (place / "list.yaml").write_text("- stage: finetune\n")
    (place / "twice.yaml").write_text("output_dir: a\noutput_dir: b\n")
    (place / "cut.yaml").write_text("stages: [\n")
    refused(["run", *line.split()], capsys, says)


def test_what_is_made_worse_is_good(place, capsys):
    """Otherwise a bad recipe could be refused for another reason."""
    files = tree()
    recipe = write_recipe(place / "good.yaml", TEACHER, {**PRUNED, "mac_ratio": [0.7, 0.5]}, RECOVERED, LINEAR)
    assert main(["run", recipe, "--dry_run"]) == 0
    assert tree().keys() - files.keys() <= {"good.yaml"}
    assert "[4/6] recovered-0.7" in capsys.readouterr().out
