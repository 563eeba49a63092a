"""What cannot be exported or uploaded is one line and exit code 2, and nothing is written."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_compress.cli.main import main
from tests import bad_commands
from tests.file_trees import tree
from tests.test_recipe_mistakes import MISTAKES as RECIPES


PUSH, EXPORT = bad_commands.GOOD["push"], bad_commands.GOOD["export"]


def of(command, folder):
    return command.replace("model_name_or_path model", f"model_name_or_path {folder}")


def into(command, folder):
    return command.replace("output_dir out", f"output_dir {folder}")


PUSHED = {
    "file": (of(PUSH, "file"), "must be a folder with a saved model, got 'file'"),
    "adapter": (of(PUSH, "adapter"), "no config.json there: merge the adapter first"),
    "teacher-alone": (of(PUSH, "teacher_alone"), "no config.json there"),
    "shard-gone": (of(PUSH, "shards"), "No model can be opened at 'shards'"),
    "pickled": (of(PUSH, "pickled"), "must hold weights in safetensors files, got none"),
    "not-a-number": (of(PUSH, "nan"), "'nan' must not be uploaded: Weights must be finite, got NaN"),
    "exported": (of(PUSH, "graph"), "must hold weights in safetensors files"),
    "into-model": (into(PUSH, "model"), "is the folder of model_name_or_path"),
    "inside-model": (into(PUSH, "model/inside"), "output_dir must lie outside of model_name_or_path"),
    "into-file": (into(PUSH, "file"), "cannot be written"),
    "below-file": (into(PUSH, "file/x"), "cannot be written"),
    "no-such-disk": (into(PUSH, "/proc/x"), "cannot be written"),
    "name-empty": (PUSH.replace("me/model", "''"), "repo_id is empty"),
    "name-space": (PUSH.replace("me/model", "'a b'"), "repo_id must be a name or owner/name"),
    "name-of-three": (PUSH.replace("me/model", "a/b/c"), "repo_id must be a name or owner/name"),
    "name-long": (PUSH.replace("me/model", "x" * 200), "repo_id must be a name or owner/name"),
    "task-alone": (f"{PUSH} --eval_task sst2", "eval_task must be left out without eval_dataset"),
    "benchmark-name": (f"{PUSH} --eval_dataset a--b", "eval_dataset must be the Hub's name of a data set"),
    "benchmark-unmeasured": (f"{PUSH} --eval_dataset a/b", "eval_dataset must come with a report"),
    "report-gone": (f"{PUSH} --report nowhere", "report 'nowhere' cannot be read"),
    "report-cut": (f"{PUSH} --report cut", "report 'cut/report.json' cannot be read"),
    "report-words": (f"{PUSH} --report file", "report 'file' cannot be read"),
    "message-empty": (f"{PUSH} --commit_message ''", "commit_message is empty"),
    "revision": (f"{PUSH} --revision main", "'revision' is not an option"),
}
EXPORTED = {
    "file": (of(EXPORT, "file"), "can be opened at 'file'"),
    "adapter": (of(EXPORT, "adapter"), "No classifier can be opened at 'adapter'"),
    "teacher-alone": (of(EXPORT, "teacher_alone"), "can be opened at 'teacher_alone'"),
    "shard-gone": (of(EXPORT, "shards"), "No classifier can be opened at 'shards'"),
    "pickled": (of(EXPORT, "pickled"), "No classifier can be opened at 'pickled'"),
    "half": (of(EXPORT, "half"), "model must be in single precision, got torch.float16"),
    "not-a-number": (of(EXPORT, "nan"), "Weights must be finite, got NaN"),
    "into-model": (into(EXPORT, "model"), "is the folder of model_name_or_path"),
    "into-file": (into(EXPORT, "file"), "cannot be written"),
    "opset": (f"{EXPORT} --opset 9", "'opset' is not an option"),
    "format": (f"{EXPORT} --format onnx-int4", "format must be "),
    "int8": (f"{EXPORT} --int8 maybe", "--int8"),
    "bound-zero": (f"{EXPORT} --int8_bound 0", "int8_bound must be positive, got 0"),
    "bound-negative": (f"{EXPORT} --int8_bound -1", "int8_bound must be positive, got -1"),
    "bound-nan": (f"{EXPORT} --int8_bound nan", "int8_bound must be positive, got nan"),
    "checked": (f"{EXPORT} --check_examples 0", "check_examples must be at least 1, got 0"),
    "timed": (f"{EXPORT} --latency_examples 0", "latency_examples must be at least 1, got 0"),
    "batch-zero": (f"{EXPORT} --latency_batch_sizes 0", "latency_batch_sizes must be at least 1"),
    "batch-none": (f"{EXPORT} --latency_batch_sizes", "expected at least one argument"),
    "split": (f"{EXPORT} --split nowhere", "split must be one of train, validation, got 'nowhere'"),
    "length": (f"{EXPORT.replace('--max_length 16', '')} --max_length 10000", "max_length must be at most 32"),
    "device": (f"{EXPORT} --device cuda:9", "device must be auto or one of this machine"),
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    bad_commands.write_place(root)
    before = os.getcwd()
    os.chdir(root)
    Path("file").write_text("x")
    Path("cut").mkdir()
    Path("cut/report.json").write_text("{")
    for name in ("adapter", "shards", "pickled", "graph", "half", "nan"):
        shutil.copytree("model", name)
    Path("adapter/config.json").rename("adapter/adapter_config.json")
    Path("shards/model.safetensors").rename("shards/model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({}, "pickled/pytorch_model.bin")
    Path("graph/model.safetensors").rename("graph/model.onnx")
    Path("pickled/model.safetensors").unlink()
    shutil.copytree("model", "teacher_alone/teacher")
    AutoModelForSequenceClassification.from_pretrained("model").half().save_pretrained("half")
    model = AutoModelForSequenceClassification.from_pretrained("model")
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained("nan")
    yield
    os.chdir(before)


def refused(line, says, capsys):
    files = tree()
    assert main(shlex.split(line)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert says in err.strip().splitlines()[-1]
    assert tree() == files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUSHED)
def test_bad_push(name, capsys):
    refused(*PUSHED[name], capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTED)
def test_bad_export(name, capsys):
    refused(*EXPORTED[name], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["push", "export"])
def test_a_disk_without_room(command):
    """As far as a program can tell: no file may become larger than 10 kB."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    files = tree()
    done = subprocess.run(
        [sys.executable, "-m", "hf_compress", *shlex.split(bad_commands.GOOD[command])], preexec_fn=small_files,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("hf-compress: output_dir 'out' cannot be written")
    assert tree() == files


def test_there_are_many():
    assert len(PUSHED) + len(EXPORTED) >= 40
    assert len(RECIPES) >= 40
