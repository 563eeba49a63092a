"""Recipes: families, what is skipped and what runs again, lineage, log, and the plan of the shipped ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.recipes.inputs import differences
from hf_compress.recipes.jobs import jobs_of
from hf_compress.recipes.reading import read_recipe
from hf_compress.recipes.target import chosen, verdict
from tests.recipe_files import LINEAR, PRUNED, RECOVERED, TEACHER, UNTRAINED, write_encoder, write_place, write_recipe


@pytest.fixture
def place(tmp_path):
    write_place(tmp_path)
    before = os.getcwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def jobs(place, *stages, **shared):
    return jobs_of(read_recipe(write_recipe(place / "recipe.yaml", *stages, **shared), {}))


def test_a_family_goes_on_through_the_stages_that_read_it(place):
    wide = {**PRUNED, "mac_ratio": [0.7, 0.5]}
    two = {**RECOVERED, "learning_rate": [1e-4, 3e-5]}
    both = {"stage": "report", "models": ["teacher", "pruned", "recovered-0.5-3e-05"]}
    scores = {"stage": "evaluate", "models": "pruned"}
    one = {**RECOVERED, "name": "one", "model_name_or_path": "pruned-0.7"}
    # Student and teacher of one family are of the same member.
    pair = {**RECOVERED, "name": "pair", "teacher_name_or_path": "pruned", "model_name_or_path": "recovered"}
    found = {job.name: job for job in jobs(place, TEACHER, wide, two, both, one, pair, scores)}
    assert list(found) == [
        "teacher", "pruned-0.7", "pruned-0.5", "recovered-0.7-0.0001", "recovered-0.5-0.0001", "recovered-0.7-3e-05",
        "recovered-0.5-3e-05", "report", "one-0.7", "pair-0.7-0.0001", "pair-0.5-0.0001", "pair-0.7-3e-05",
        "pair-0.5-3e-05", "evaluate",
    ]  # fmt: skip
    assert found["recovered-0.5-3e-05"].needs() == ["pruned-0.5", "teacher"]
    assert found["recovered-0.5-3e-05"].options["learning_rate"] == 3e-5
    assert found["report"].needs() == ["teacher", "pruned-0.7", "pruned-0.5", "recovered-0.5-3e-05"]
    assert found["evaluate"].needs() == ["pruned-0.7", "pruned-0.5"]
    assert found["pair-0.7-3e-05"].needs() == ["recovered-0.7-3e-05", "pruned-0.7"]
    assert found["one-0.7"].values(Path("out"))["model_name_or_path"] == "out/pruned-0.7"


def test_values_for_all_stages_go_where_there_is_an_option_for_them(place):
    teacher, pruned = jobs(place, {**TEACHER, "seed": 5}, PRUNED, seed=3, calibration_samples=32)
    assert (teacher.options["seed"], pruned.options["calibration_samples"]) == (5, 32)
    assert "seed" in pruned.options
    assert "calibration_samples" not in teacher.options
    assert "num_train_epochs" not in pruned.options


def test_states_of_a_training_are_named_by_a_place_within_it(place):
    last = {"stage": "snapshot_distill", "model_name_or_path": "linear", "teacher_snapshots": ["teacher/checkpoint-*"]}
    *_, job = jobs(place, TEACHER, LINEAR, last)
    assert job.values(Path("out"))["teacher_snapshots"] == ["out/teacher/checkpoint-*"]


def states(folder="out"):
    """Job -> when its model was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/model.safetensors")}


def run(recipe, capsys, *more):
    assert main(["run", recipe, *more]) == 0
    return capsys.readouterr()


def test_only_what_changed_runs_again(place, capsys):
    stages = [TEACHER, {**PRUNED, "mac_ratio": [0.5], "calibration_samples": 64}, {**LINEAR, "projected_length": 16}]
    recipe = write_recipe(place / "recipe.yaml", *stages)
    printed = run(recipe, capsys)
    assert "[1/3] teacher     finetune: data (64 training rows, 5 tokens each), about" in printed.out
    # Linear attention costs more than it saves on such texts: that is in the log, and counted here.
    assert re.search(r"\[3/3\] linear      done in \d+ s \(1 warning in recipe.log\)", printed.out)
    assert "costs more than it saves" in Path("out/recipe.log").read_text()
    # What the stages print is in the log alone.
    assert "train_loss" not in printed.out + printed.err
    assert "train_loss" in Path("out/recipe.log").read_text()
    first = states()
    assert set(first) == {"teacher", "pruned-0.5", "linear"}
    _check_lineage()

    with open("data/train.tsv", "a") as file:
        file.write("good w1 w1\t1\n")
    plan = run(recipe, capsys, "--dry_run").out
    assert "teacher     finetune: again (data_dir: data/train.tsv changed), data (65 training rows" in plan
    assert "pruned-0.5  structured_pruning: again (data_dir: data/train.tsv, stage 'teacher' changed)" in plan
    assert "finished results that are made again are first moved to out/.before" in plan
    assert states() == first
    printed = run(recipe, capsys).out
    assert "again (data_dir: data/train.tsv changed)" in printed
    assert "[3/3] linear      linformer: done before with the same inputs" in printed
    second = states()
    assert {name for name in first if second[name] != first[name]} == {"teacher", "pruned-0.5"}
    assert states("out/.before") == {name: first[name] for name in ("teacher", "pruned-0.5")}

    # Another member of the family, a result that somebody damaged, and a file that a killed process was writing.
    Path("out/linear/model.safetensors").write_bytes(b"")
    Path("out/teacher/.lineage.json.7178-58ca15b5.incomplete").write_text("[")
    Path("out/teacher/.notes.incomplete").write_text("somebody else's")
    stages[1] = {**stages[1], "mac_ratio": [0.5, 0.4]}
    printed = run(write_recipe(place / "recipe.yaml", *stages), capsys)
    assert "goes on (model.safetensors is missing or was changed)" in printed.out
    third = states()
    assert {name for name in second if third[name] != second[name]} == {"linear"}
    assert set(third) - set(second) == {"pruned-0.4"}
    assert [path.name for path in Path("out").rglob(".*incomplete")] == [".notes.incomplete"]


def _check_lineage():
    lineage = json.loads(Path("out/pruned-0.5/lineage.json").read_text())
    assert [(entry["name"], entry["stage"]) for entry in lineage] == [
        ("teacher", "finetune"), ("pruned-0.5", "structured_pruning")
    ]  # fmt: skip
    assert lineage[1]["options"]["model_name_or_path"] == "teacher"
    assert lineage[1]["options"]["mac_ratio"] == 0.5
    assert "data_dir: data/train.tsv" in lineage[0]["files"]
    assert lineage[0]["code"]["hf_compress"] == hc.__version__
    card = Path("out/pruned-0.5/README.md").read_text()
    assert card.count("## How it was made") == 1
    assert "2. `pruned-0.5`: structured_pruning, " in card
    assert "`model_name_or_path: teacher`" in card


def test_a_stage_that_fails_keeps_what_came_before(place, capsys):
    # Only the training finds out that a loss this large is not finite.
    bad = {**RECOVERED, "learning_rate": 1e30, "model_name_or_path": "teacher", "num_train_epochs": 2}
    recipe = write_recipe(place / "recipe.yaml", TEACHER, bad, max_grad_norm=0)
    assert main(["run", recipe]) == 2
    assert "finite" in capsys.readouterr().err
    assert json.loads(Path("out/teacher/stage.json").read_text())["done"]
    assert not json.loads(Path("out/recovered/stage.json").read_text())["done"]
    stages = (TEACHER, {**RECOVERED, "model_name_or_path": "teacher"})
    printed = run(write_recipe(place / "recipe.yaml", *stages, max_grad_norm=0), capsys)
    assert "[1/2] teacher    finetune: done before" in printed.out
    assert "again (learning_rate, num_train_epochs changed)" in printed.out


REPORT = {
    "metric": "accuracy",
    "models": [
        {"name": name, "metrics": {"accuracy": score}, "latency": [{"speedup": {"median": times}} for times in speeds]}
        for name, score, speeds in (
            ("dense", 0.90, (1.0, 1.0)), ("a", 0.91, (1.2, 1.2)), ("b", 0.895, (1.0, 4.0)), ("c", 0.894, (1.9, 2.0)),
            ("d", 0.80, (9.0, 9.0)),
        )
    ],
}  # fmt: skip


@pytest.mark.slow
def test_a_target_is_chosen_by_measured_speed(place, capsys):
    stages = (TEACHER, {**PRUNED, "mac_ratio": [0.7, 0.5]})
    target = {"dense": "teacher", "among": "pruned", "max_drop": 100, "batch_size": 1}
    recipe = write_recipe(place / "recipe.yaml", *stages, target=target)
    printed = run(recipe, capsys).out
    assert "[4/4] target      done in" in printed
    assert "target: pruned-0." in printed
    found = json.loads(Path("out/target/target.json").read_text())
    assert [model["name"] for model in found["models"]] == ["pruned-0.7", "pruned-0.5"]
    assert found["best"] in found["front"]
    # It says so again without measuring again.
    assert "target: pruned-0." in run(recipe, capsys).out


@pytest.mark.parametrize(("max_drop", "best"), [(0, "a"), (0.4, "a"), (1.0, "b"), (20, "d")])
def test_the_fastest_within_the_target_is_chosen(max_drop, best):
    found = chosen(REPORT, max_drop)
    assert found["best"] == best
    # c loses more than b and is slower in the geometric mean.
    assert found["front"] == ["a", "b", "d"]
    assert found["models"][1]["speedup"] == pytest.approx(2.0)
    assert f"target: {best} is the fastest at batch size 1 and 8 that loses at most" in verdict(found, [1, 8])[-1]


def test_no_model_may_meet_the_target():
    found = chosen({**REPORT, "models": [REPORT["models"][0], REPORT["models"][-1]]}, 1.0)
    assert found["best"] is None
    assert "no model loses at most 1 points of accuracy" in verdict(found, [1])[-1]


def test_differences_name_what_changed():
    before = {"options": {"seed": 1, "x": 2}, "files": {"a": "1"}, "stages": {"t": "k"}, "code": {"torch": "1"}}
    now = {"options": {"seed": 1, "y": 2}, "files": {"a": "2"}, "stages": {"t": "l"}, "code": {"torch": "2"}}
    assert differences(before, now) == ["x", "y", "a", "stage 't'", "the code"]
    assert differences(before, before) == []


def test_flags_replace_values_for_all_stages(place, capsys):
    recipe = write_recipe(place / "recipe.yaml", TEACHER)
    plan = run(recipe, capsys, "--output-dir", "elsewhere", "--data_dir=b", "--dry_run", "true").out
    assert "finetune: b (64 training rows" in plan
    assert "in elsewhere" in plan


SHIPPED = sorted((Path(__file__).resolve().parents[1] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_shipped_recipes_can_be_run(file, place, capsys):
    """Except for their models and data, which are local ones here."""
    # BERT-mini has four layers, and six of twelve are taken in ProKT, whose updates have eight batches of 32.
    header, *rows = Path("data/train.tsv").read_text().splitlines()
    Path("data/train.tsv").write_text("\n".join([header, *rows * 4]) + "\n")
    write_encoder(place / "own", {"inc_pruning": 4, "prokt": 12}.get(file.stem, 2))
    flags = {
        "model_name_or_path": "own",
        "data_dir": "data",
        "task_name": "sst2",
        "max_length": 16,
        "output_dir": "out",
    }
    if "projected_length" in yaml.safe_load(file.read_text()):
        flags["projected_length"] = 8
    plan = run(str(file), capsys, *(f"--{name}={value}" for name, value in flags.items()), "--dry_run").out
    assert f"[1/{len(plan.splitlines()) - 1}]" in plan
    assert plan.rstrip().endswith("in out")
    assert not Path("out").exists()


def test_every_system_has_a_recipe():
    assert {file.stem for file in SHIPPED} >= {"cald", "ltp", "inc_pruning", "stat", "prokt"}


def test_stages_of_every_kind_are_planned(place, capsys):
    Path("corpus.txt").write_text("good w1 w2\nbad w3\n")
    from_teacher = {"model_name_or_path": "teacher"}
    recipe = write_recipe(
        place / "recipe.yaml",
        {**TEACHER, "save_total_limit": 3},
        {"stage": "layer-selection", "name": "shallow", "model_name_or_path": "teacher", "num_layers": 1},
        {"stage": "prune-vocabulary", "name": "words", "corpus": ["corpus.txt"], **from_teacher},
        {"stage": "linearize", "name": "linear", "model_name_or_path": "base", "projected_length": 4},
        {"stage": "joint-distill", "name": "joint", "model_name_or_path": "linear", "teacher_name_or_path": "base"},
        {"stage": "snapshot-distill", "model_name_or_path": "linear", "teacher_snapshots": ["teacher/checkpoint-*"]},
        {"stage": "distill", "teacher_name_or_path": "joint/teacher", "model_name_or_path": "shallow"},
        {"stage": "prune-tokens", "name": "soft", "target_relative_macs": 0.6, **from_teacher},
        {"stage": "prune-tokens", "name": "hard", "model_name_or_path": "soft", "soft_fraction": 0},
        {"stage": "prune-weights", "name": "sparse", "pattern": "2:4", "target_sparsity": 0.5, **from_teacher},
        {"stage": "proximal", "name": "lstm", "model_name_or_path": "bilstm", "teacher_name_or_path": "base"},
        {"stage": "export", "model_name_or_path": "sparse"},
        {"stage": "evaluate", "models": ["hard", "sparse", "lstm"]},
    )
    plan = run(recipe, capsys, "--dry_run").out
    assert "[13/13] evaluate" in plan
    assert not Path("out").exists()


def yamls_of(page):
    root = Path(__file__).resolve().parents[1]
    return re.findall(r"```yaml\n(.*?)```", (root / "docs" / page).read_text(), re.DOTALL)


def test_the_recipe_of_the_page_and_of_the_help_can_be_run(place, capsys):
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out.partition("A recipe:\n")[2].partition("\nThe name")[0]
    first, target, searched = yamls_of("recipes.md")
    for text in (shown, first, f"{first}{target}", f"{first}{searched}"):
        Path("recipe.yaml").write_text(textwrap.dedent(text))
        flags = ("--model_name_or_path=encoder", "--data_dir=data", "--output_dir=out", "--max_length=16")
        run("recipe.yaml", capsys, *flags, "--dry_run")


HOLD = """
import pathlib, sys, filelock
pathlib.Path("out").mkdir()
with filelock.FileLock("out/_training.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused(place, capsys):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert main(["run", write_recipe(place / "recipe.yaml", TEACHER)]) == 2
        assert "still running" in capsys.readouterr().err
        assert not Path("out/teacher").exists()
        other.stdin.close()


def test_several_processes_are_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", write_recipe(place / "recipe.yaml", {**LINEAR, "data_dir": "data"}, **UNTRAINED)]) == 2
    assert "as one process" in capsys.readouterr().err
    assert not Path("out").exists()
