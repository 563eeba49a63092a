"""Saving a model: one writer, nothing of others removed, no older weights under a new record, one line of error."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_compress.core import saving
from hf_compress.core.saving import complete_or_absent, require_own_folder, sole_training, write_json
from tests import crash_program


def _save(folder: Path, hidden: int = 16, shards: bool = False) -> None:
    with complete_or_absent(folder) as staged:
        crash_program.build(hidden, 1, hidden).save_pretrained(staged, max_shard_size="10KB" if shards else "1GB")


def _bin_model(folder: Path, seed: int) -> None:
    """A model as transformers saved it before safetensors."""
    model = crash_program.build(16, 1, seed)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


OTHERS = ("notes.txt", "embeddings.safetensors", "model.safetensors.bak", "mymodel.safetensors", "a/model.safetensors")


@pytest.mark.parametrize("shards", [False, True])
def test_files_of_others_stay(tmp_path, shards):
    for name in OTHERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for hidden in (16, 24):
        _save(tmp_path, hidden, shards)
        assert BertForSequenceClassification.from_pretrained(tmp_path).config.hidden_size == hidden
    assert [(tmp_path / name).read_text() for name in OTHERS] == list(OTHERS)
    assert not list(tmp_path.glob(".*")), "a lock or a staging folder was left"


def test_an_unsharded_model_replaces_a_sharded_one(tmp_path):
    _save(tmp_path, 16, shards=True)
    assert (tmp_path / "model.safetensors.index.json").exists()
    _save(tmp_path, 24)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_an_adapter_spares_the_model_it_belongs_to_and_a_model_replaces_an_adapter(tmp_path):
    _save(tmp_path)
    with complete_or_absent(tmp_path) as staged:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (staged / name).write_text("adapter")
    assert (tmp_path / "model.safetensors").exists()
    _save(tmp_path, 24)
    # With it, from_pretrained would open the adapter's base instead of the model that was saved last.
    assert not list(tmp_path.glob("adapter*"))


class _Death(BaseException):
    """The process is killed here."""


@pytest.mark.parametrize("moment", range(5))
def test_older_weights_never_open_under_a_new_record(tmp_path, monkeypatch, moment):
    """Killed before the `moment`-th change to the folder: what opens is the old model or the new one, whole."""
    _bin_model(tmp_path, seed=5)
    crash_program.build(16, 1, 6).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    changes = []

    def dying(real):
        def change(*args):
            if args and str(args[0]).startswith(str(tmp_path)) and "lock" not in str(args[0]):
                if len(changes) == moment:
                    raise _Death
                changes.append(args)
            return real(*args)

        return change

    monkeypatch.setattr(saving.os, "replace", dying(os.replace))
    monkeypatch.setattr(saving.Path, "unlink", dying(Path.unlink))
    died = False
    try:
        with complete_or_absent(tmp_path) as staged:
            new = crash_program.build(24, 1, 7)
            new.config.update({"new_record": True})
            new.save_pretrained(staged)
    except _Death:
        died = True
    monkeypatch.undo()
    if not list(tmp_path.glob("*model*")):
        assert died
        with pytest.raises(OSError, match="no file named"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)
        return
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    if opened.config.to_dict().get("new_record"):
        assert not died
        assert opened.config.hidden_size == 24
    else:
        assert (tmp_path / "config.json").read_text() == config
        assert torch.equal(opened.classifier.weight, crash_program.build(16, 1, 6).classifier.weight)


def _save_often(folder: str, hidden: int, rounds: int, barrier) -> None:
    torch.set_num_threads(1)
    for _ in range(rounds):
        barrier.wait(60)
        _save(Path(folder), hidden)
        barrier.wait(60)


@pytest.mark.parametrize("rounds", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_two_processes_save_into_one_folder(tmp_path, rounds):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [
        context.Process(target=_save_often, args=(str(tmp_path), hidden, rounds, barrier)) for hidden in (16, 24)
    ]
    for writer in writers:
        writer.start()
    for number in range(rounds):
        barrier.wait(60)
        barrier.wait(60)
        model = BertForSequenceClassification.from_pretrained(tmp_path)
        expected = crash_program.build(model.config.hidden_size, 1, model.config.hidden_size).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), number
        assert not list(tmp_path.glob(".*"))
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0


ERRORS = {
    "open": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "nothing said": OSError(errno.ENOSPC, None),
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "torch's writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
def test_a_full_disk_is_one_line_and_leaves_the_old_model(tmp_path, error):
    _save(tmp_path)

    def fail():
        with complete_or_absent(tmp_path) as staged:
            (staged / "config.json").write_text("{}")
            raise error

    message = r"^output_dir '.*' cannot be written: (No space left|Disk quota|Read-only|torch could not).*\.$"
    with pytest.raises(ValueError, match=message):
        fail()
    assert BertForSequenceClassification.from_pretrained(tmp_path).config.hidden_size == 16
    assert not list(tmp_path.glob(".*"))


def test_errors_of_another_kind_pass_as_they_are(tmp_path):
    for error in (RuntimeError("shapes"), SafetensorError("header"), ConnectionError("offline"), FileNotFoundError(2)):

        def fail(error=error):
            with complete_or_absent(tmp_path):
                raise error

        with pytest.raises(type(error)) as raised:
            fail()
        assert raised.value is error


def test_a_disk_that_is_really_full(small_disk):
    disk = small_disk(64)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        _save(disk / "model", 96)
    assert shutil.disk_usage(disk).free > 50_000
    assert not list((disk / "model").iterdir())


def test_an_output_folder_is_checked_before_the_work(tmp_path, monkeypatch):
    model, file = tmp_path / "model", tmp_path / "file"
    model.mkdir()
    file.write_text("")
    (tmp_path / "link").symlink_to(model)
    require_own_folder(tmp_path / "new" / "deep", {"model_name_or_path": "bert-base-uncased", "teacher": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model"]
    for folder, message in {
        "": "output_dir is empty",
        str(model): "is the folder of model_name_or_path",
        f"{tmp_path}/link/": "is the folder of model_name_or_path",
        f"{file}/below": "cannot be written: '.*file' is a file",
        str(file): "cannot be written: '.*file' is a file",
    }.items():
        with pytest.raises(ValueError, match=message):
            require_own_folder(folder, {"teacher": None, "model_name_or_path": model})

    def read_only(dir, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError, match=r"^output_dir '.*new' cannot be written: Read-only file system\.$"):
        require_own_folder(tmp_path / "new")


def test_the_working_directory_is_no_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="output_dir is empty"):
        _save("")
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def _hold(folder: str, ready, done) -> None:
    with sole_training(folder):
        ready.set()
        done.wait(60)


@pytest.mark.parametrize("killed", [False, True])
def test_the_folder_of_a_running_training_is_refused(tmp_path, killed):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(60)
    for attempt in (lambda: _save(tmp_path), lambda: require_own_folder(tmp_path)):
        with pytest.raises(ValueError, match="belongs to a training that is still running"):
            attempt()
    holder.kill() if killed else done.set()
    holder.join(60)
    assert (tmp_path / "_training.lock").exists() == killed
    with sole_training(tmp_path):
        # In the same process a training saves into its own folder.
        _save(tmp_path)
        assert (tmp_path / "_training.lock").exists()
    assert not list(tmp_path.glob("[._]*"))


def test_failed_json_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
