"""A recipe killed at random moments and started again ends in the same models, byte for byte."""

from __future__ import annotations

import json
import os
import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import recipe_program
from tests.recipe_files import LINEAR, PRUNED, RECOVERED, TEACHER, write_place, write_recipe
from tests.two_processes import fork_server


KILLS = int(os.environ.get("KILL_ROUNDS", "10"))
SEED = int(os.environ.get("KILL_SEED", "0"))
OFTEN = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "num_train_epochs": 3}
STAGES = (
    {**TEACHER, **OFTEN},
    {**PRUNED, "mac_ratio": [0.7, 0.5], "calibration_samples": 64},
    {**RECOVERED, **OFTEN, "alpha_layer": 1, "model_name_or_path": "pruned-0.5"},
    {**LINEAR, "model_name_or_path": "base", "data_dir": "data"},
    {"stage": "proximal", "name": "near", "model_name_or_path": "linear", "teacher_name_or_path": "base", **OFTEN},
    {"stage": "weight_pruning", "name": "sparse", "model_name_or_path": "teacher", "pattern": "2:4",
     "target_sparsity": 0.5, "pruning_frequency": 1, **OFTEN},
    *([{"stage": "export", "model_name_or_path": "pruned-0.5", "latency_repeats": 1, "latency_examples": 8,
        "check_examples": 8}] if find_spec("onnxruntime") and find_spec("onnxscript") else []),
    {"stage": "report", "models": ["teacher", "recovered", "near", "sparse"], "latency_repeats": 1,
     "latency_examples": 8},
)  # fmt: skip


def _bytes(folder: Path) -> dict[str, bytes]:
    """The files of all models."""
    names = ("model.safetensors", "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(f"*/{name}")}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    server, rng = fork_server(), random.Random(SEED)
    write_place(tmp_path)
    recipes = [write_recipe(tmp_path / f"{name}.yaml", *STAGES, output_dir=name) for name in ("whole", "killed")]

    def start(recipe: str):
        process = server.Process(target=recipe_program.run, args=(str(tmp_path), recipe, f"{recipe}.txt"))
        process.start()
        return process

    started = time.time()
    process = start(recipes[0])
    process.join(300)
    assert process.exitcode == 0
    whole, printed = time.time() - started, Path(f"{recipes[1]}.txt")
    during, again = [], 0
    while len(during) < KILLS:
        before = recipe_program.begun(printed)
        process = start(recipes[1])
        while recipe_program.begun(printed) == before and process.is_alive():
            time.sleep(0.005)
        # Twice the time for a stage that was killed before: on a slow machine one alone may need more than the mean.
        process.join(rng.uniform(0, 1.2 * whole / KILLS * 2**again))
        if process.exitcode is not None:
            break
        process.kill()
        process.join(60)
        during.append(_at_work(tmp_path / "killed"))
        again = again + 1 if during[-2:-1] == during[-1:] else 0
    process = start(recipes[1])
    process.join(300)
    assert process.exitcode == 0, printed.read_text()
    print(f"killed {len(during)} times, at work on {during}; an unbroken run takes {whole:.0f} s")
    assert len(during) >= KILLS / 2
    assert len(set(during)) >= 3
    expected, found = _bytes(tmp_path / "whole"), _bytes(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert len([name for name in expected if name.endswith(".safetensors")]) == 7
    assert [name for name in expected if expected[name] != found[name]] == []
    assert json.loads((tmp_path / "killed" / "report" / "report.json").read_text())["models"]
    left = [path.name for path in (tmp_path / "killed").rglob("*") if path.name.startswith((".", "_training"))]
    assert not left


def _at_work(folder: Path) -> str:
    notes = {path.parent.name: json.loads(path.read_text())["done"] for path in folder.glob("*/stage.json")}
    return next((name for name, done in notes.items() if not done), "between stages")
