"""A compression method outside of the package: one folder, found through its entry point, and nothing to edit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress as hc


TESTS = Path(__file__).resolve().parent
TOY = TESTS / "toy_method"


def run(*command, installed=TOY, fails=False):
    """The output of a command in a process where the distributions of a folder are installed."""
    path = os.pathsep.join([str(installed), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def program(*arguments):
    return json.loads(run("-m", "tests.toy_program", *arguments).splitlines()[-1])


def test_it_compresses_and_opens_in_a_fresh_process(tmp_path):
    assert set(program(tmp_path, "write")) == {*hc.METHODS, "output_gain"}
    program(tmp_path, "read")


def test_it_trains_and_resumes(tmp_path):
    program(tmp_path, "train")


def test_without_it_the_model_says_what_is_missing(tmp_path):
    program(tmp_path, "write")
    opening = "import sys, hf_compress, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
    said = run("-c", opening, tmp_path / "model", installed=tmp_path, fails=True)
    assert "method must be one of" in said
    assert "got 'output_gain'" in said


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("output_gain = nowhere:METHOD", "entry point output_gain = nowhere:METHOD of output-gain fails with Module"),
        ("output_gain = output_gain:Method", "gives .*Method.*, which is no Method named 'output_gain'"),
        ("gain = output_gain:METHOD", "gives 'output_gain', which is no Method named 'gain'"),
        ("linformer = output_gain.twin:METHOD", "Two compression methods are named linformer: hf_compress.methods"),
    ],
)  # fmt: skip
def test_broken_announcements_fail_loudly(tmp_path, entry, message):
    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "toy" / "output_gain-1.0.dist-info" / "entry_points.txt").write_text(
        f"[hf_compress.methods]\n{entry}\n"
    )
    twin = (
        "import dataclasses\nfrom output_gain import METHOD\nMETHOD = dataclasses.replace(METHOD, name='linformer')\n"
    )
    (tmp_path / "toy" / "output_gain" / "twin.py").write_text(twin)
    said = run("-c", "import hf_compress; hf_compress.METHODS", installed=tmp_path / "toy", fails=True)
    assert re.search(message, said), said
