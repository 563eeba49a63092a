"""Recipes that come with the package, run on small models; `test_recipes.py` checks the plans of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_compress.cli.main import main
from tests.recipe_files import write_encoder, write_place


RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "models"), [
    ("inc_pruning", 4, ["dense", "sparse"]), ("ltp", 2, ["dense", "hard"]),
    ("stat", 2, ["dense", "pruned-0.7", "pruned-0.5", "pruned-0.3"]),
])  # fmt: skip
def test_a_published_recipe_runs(name, layers, models, tmp_path, monkeypatch):
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "own", layers)
    flags = {"model_name_or_path": "own", "data_dir": "data", "task_name": "sst2", "max_length": 16}
    given = [f"--{flag}={value}" for flag, value in flags.items()]
    assert main(["run", str(RECIPES / f"{name}.yaml"), *given, "--output_dir=out"]) == 0
    report = json.loads(Path("out/report/report.json").read_text())
    assert [model["name"] for model in report["models"]] == models
    assert all(0 <= model["metrics"]["accuracy"] <= 1 for model in report["models"])
