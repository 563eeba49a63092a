"""The stage that searches for the fastest student within a bound: what it draws, keeps and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from transformers import AutoConfig

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.stages import search
from hf_compress.stages.arguments import DeviceArguments, TeacherArguments
from hf_compress.stages.search_space import read_dials
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.sources import load_task
from hf_compress.training.arguments import DistillationArguments
from tests.recipe_files import PRUNED, RECOVERED, TEACHER, write_place, write_recipe


CUTS = {**PRUNED, "model_name_or_path": "classifier", "mac_ratio": [0.7, 0.4], "ridge": 0.01}
SEARCHED = {
    "stage": "search", "name": "searched", "models": "pruned", "teacher_name_or_path": "classifier", "trials": 4,
    "max_drop": 100, "space": ["learning_rate=1e-4:1e-2", "alpha_layer=0|1"], "latency_repeats": 1,
}  # fmt: skip
# Two cuts as fast as this on every machine.
SPEEDS = {"out/pruned-0.7": 1.5, "out/pruned-0.4": 2.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    write_place(root)
    before = os.getcwd()
    os.chdir(root)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield root
    os.chdir(before)


@pytest.fixture(scope="module")
def searched(place):
    """Results of a recipe with a search in it, whose bound every student meets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "measure_latency", lambda models, *_, **__: list(models))
        patch.setattr(search, "speedups", lambda names, _: {name: _Faster(SPEEDS.get(name, 1.0)) for name in names})
        assert main(["run", write_recipe(place / "recipe.yaml", CUTS, SEARCHED)]) == 0
    return json.loads(Path("out/searched/results.json").read_text())


class _Faster:
    def __init__(self, median):
        self.median = median


def test_the_fastest_within_the_bound_is_trained_again_and_saved(searched):
    trials = searched["trials"]
    assert len(trials) == 4
    assert {trial["model"] for trial in trials} <= set(SPEEDS)
    assert all(trial["speedup"] == SPEEDS[trial["model"]] and trial["within"] for trial in trials)
    assert all(1e-4 <= trial["settings"]["learning_rate"] <= 1e-2 for trial in trials)
    assert all(trial["settings"]["alpha_layer"] in (0, 1) for trial in trials)
    assert len({trial["settings"]["learning_rate"] for trial in trials}) == 4
    fastest = [trial for trial in trials if trial["speedup"] == max(each["speedup"] for each in trials)]
    best = min(fastest, key=lambda trial: trial["drop"])
    assert {name: searched[name] for name in best} == best
    # The saved student is the trial's: the same settings give the same scores.
    dense = searched["eval_accuracy"] + best["drop"] / 100
    teacher = json.loads(_evaluated("classifier").read_text())["classifier"]["accuracy"]
    assert dense == pytest.approx(teacher)
    assert _steps("out/searched") == _steps(best["model"])
    assert json.loads(Path("out/searched/trials.json").read_text()) == trials


def _steps(folder):
    return hc.steps_of(AutoConfig.from_pretrained(folder))


def _evaluated(name):
    main(f"evaluate --models {name} --data_dir data --max_length 16 --device cpu --output_file scores.json".split())
    return Path("scores.json")


def test_a_recipe_does_not_search_twice(searched, place, capsys):
    assert main(["run", write_recipe(place / "recipe.yaml", CUTS, SEARCHED)]) == 0
    assert "search: done before with the same inputs" in capsys.readouterr().out


def test_stored_speeds_are_those_of_the_same_settings_and_weights(searched, tmp_path, monkeypatch):
    measured_sizes = []
    monkeypatch.setattr(search, "measure_latency", lambda models, *_, **__: measured_sizes.append(1) or list(models))
    monkeypatch.setattr(search, "speedups", lambda names, _: {name: _Faster(2.0) for name in names})
    data = DataArguments(data_dir="data", max_length=16)
    task = load_task(data)
    teacher = search.measured("classifier", task, "validation", 16)

    def speeds(models, sizes):
        wanted = search.SearchArguments(models=models, latency_batch_sizes=sizes)
        arguments = SimpleNamespace(searched=wanted, device=DeviceArguments("cpu"), data=data)
        return search._speeds(arguments, teacher, task, tmp_path)

    [name, other] = SPEEDS
    assert speeds([name], [1]) == speeds([name], [1]) == {name: 2.0}
    assert len(measured_sizes) == 1
    speeds([name], [2])
    assert len(measured_sizes) == 2
    shutil.copytree(other, tmp_path / "cut")
    speeds([str(tmp_path / "cut")], [1])
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(name, tmp_path / "cut")
    speeds([str(tmp_path / "cut")], [1])
    assert len(measured_sizes) == 4


def test_beyond_the_bound_the_smallest_loss_counts():
    trials = [
        {"drop": drop, "speedup": speed, "within": within}
        for drop, speed, within in (
            (0.9, 2.0, True), (0.5, 2.0, True), (-3.0, 1.9, True), (1.1, 9.0, False), (1.05, 1.0, False)
        )
    ]  # fmt: skip
    order = sorted(trials, key=search._worth, reverse=True)
    assert [trials.index(trial) for trial in order] == [1, 0, 2, 4, 3]


@pytest.mark.parametrize(("text", "says"), [
    ("learning_rate", "texts such as"), ("learning_rat=1:2", "Did you mean 'learning_rate'"),
    ("output_dir=a|b", "takes a number"), ("learning_rate=2:1", "low below high"), ("learning_rate=1:2:3", "low bel"),
    ("learning_rate=fast:2", "must give learning_rate numbers"), ("seed=1.5|2", "whole numbers"),
    ("alpha_layer=-1:1", "alpha_layer must be zero or positive"), ("temperature=0|2", "temperature must be positive"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read_dials([text], DistillationArguments("out", report_to="none"))


def test_whole_numbers_stay_whole_and_wide_ranges_are_logarithmic():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    arguments = DistillationArguments("out", report_to="none")
    dials = read_dials(["seed=3:9", "learning_rate=1e-5:1e-1", "temperature=1:4", "alpha_layer=0|2.5"], arguments)
    drawn = {dial.name: dial.draw(trial) for dial in dials}
    assert isinstance(drawn["seed"], int)
    assert drawn["alpha_layer"] in (0.0, 2.5)
    kinds = trial.distributions
    assert kinds["learning_rate"].log
    assert not kinds["temperature"].log
    with pytest.raises(ValueError, match="each option once"):
        read_dials(["seed=1|2", "seed=3|4"], arguments)


MISTAKES = {
    "trials": ({"trials": 0}, "trials must be at least 1"), "drop": ({"max_drop": -1}, "max_drop must be"),
    "space": ({"space": ["learning_rate"]}, "texts such as"), "models": ({"models": []}, "models has no value"),
    "teacher": ({"alpha_output": 0}, "the teacher would teach nothing"),
    "sizes": ({"latency_batch_sizes": [0]}, "latency_batch_sizes must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_the_first_stage(place, name, capsys):
    changed, says = MISTAKES[name]
    recipe = write_recipe(place / "bad.yaml", CUTS, {**SEARCHED, **changed}, output_dir="bad")
    assert main(["run", recipe]) == 2
    assert says in capsys.readouterr().err
    assert not Path("bad").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    training = DistillationArguments(str(tmp_path), report_to="none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="search must be started as one process"):
        search.Search(
            searched=search.SearchArguments(["a"]), teacher=TeacherArguments("b"), data=DataArguments(),
            distillation=training,
        )  # fmt: skip


def test_a_search_takes_what_a_family_offers(place, capsys):
    stages = (TEACHER, {**PRUNED, "mac_ratio": [0.7, 0.5]}, {**SEARCHED, "teacher_name_or_path": "teacher"}, RECOVERED)
    recipe = write_recipe(place / "plan.yaml", *stages, output_dir="plan")
    assert main(["run", recipe, "--dry_run"]) == 0
    assert "[4/6] searched       search: " in capsys.readouterr().out
