"""Files of a learning teacher: broken ones are named in one line, and the hub gets the student alone."""

import concurrent.futures
import fnmatch
import os
import shutil
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.guided_setup import dense, linear, trainer_of


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A training of teacher, student and projectors with a checkpoint after its third update."""
    folder = tmp_path_factory.mktemp("joint")
    trainer(folder).train()
    return folder


def trainer(folder, **options):
    return trainer_of("joint", folder, linear(0), dense(1, hidden_size=32), max_steps=3, save_strategy="steps",
                      save_steps=3, **options)  # fmt: skip


class Bomb:
    def __init__(self, folder):
        self.mark = str(folder / "exploded")

    def __reduce__(self):
        return (open, (self.mark, "w"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def noise(file):
    file.write_bytes(bytes(range(256)) * 20)


def bomb(file):
    torch.save(Bomb(file.parent), file)


def old_bomb(file):
    torch.save(Bomb(file.parent), file, _use_new_zipfile_serialization=False)


def change(**entries):
    def apply(file):
        torch.save({**torch.load(file, weights_only=True), **entries}, file)

    return apply


def no_mapping(file):
    torch.save([1, 2], file)


def only_in_part(file):
    torch.save({"optimizer": {}}, file)


def other_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")


def other_model(file):
    save_file(dense(1, hidden_size=8).state_dict(), file)


def a_tensor_less(file):
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


STATE, WEIGHTS, MAPS = "teacher/training_state.pt", "teacher/model.safetensors", "projectors.safetensors"
DAMAGES = {
    "state cut": (STATE, cut), "state empty": (STATE, empty), "state noise": (STATE, noise),
    "state bomb": (STATE, bomb), "state old bomb": (STATE, old_bomb), "state no mapping": (STATE, no_mapping),
    "state in part": (STATE, only_in_part), "state zip": (STATE, other_zip),
    "random state short": (STATE, change(rng=torch.zeros(3, dtype=torch.uint8))),
    "random state text": (STATE, change(rng="abc")), "optimizer list": (STATE, change(optimizer=[1])),
    "optimizer of another model": (STATE, change(optimizer={"state": {}, "param_groups": [{"params": [0]}]})),
    "scheduler": (STATE, change(scheduler=7)),
    "weights cut": (WEIGHTS, cut), "weights empty": (WEIGHTS, empty), "weights noise": (WEIGHTS, noise),
    "weights of another model": (WEIGHTS, other_model), "weights in part": (WEIGHTS, a_tensor_less),
    "weights absent": (WEIGHTS, os.remove), "state absent": (STATE, os.remove),
    "projectors cut": (MAPS, cut), "projectors noise": (MAPS, noise), "projectors in part": (MAPS, a_tensor_less),
    "projectors absent": (MAPS, os.remove),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_broken_files_of_a_checkpoint_are_named(tmp_path, interrupted, damage):
    name, spoil = DAMAGES[damage]
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(interrupted / "checkpoint-3", folder)
    spoil(folder / name)
    with pytest.raises(ValueError, match="resume_from_checkpoint") as caught:
        trainer(tmp_path, num_train_epochs=3).train(resume_from_checkpoint=str(folder))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("exploded"))


class Hub:
    """Takes uploads as the client does: at once, or in a thread that starts when the test says so."""

    def __init__(self):
        self.seen, self.queue = [], []

    def upload_folder(self, folder_path, ignore_patterns=(), run_as_future=False, **kwargs):
        job = concurrent.futures.Future()

        def work():
            files = {os.path.relpath(os.path.join(place, name), folder_path)
                     for place, _, names in os.walk(folder_path) for name in names}  # fmt: skip
            self.seen.append({n for n in files if not any(fnmatch.fnmatch(n, p) for p in ignore_patterns)})
            job.set_result("done")

        if not run_as_future:
            work()
            return "done"
        self.queue.append(work)
        return job


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    module = transformers.trainer
    if hasattr(module, "hf_api"):
        monkeypatch.setattr(module, "hf_api", lambda: found)
    else:
        # Looked up at each call, as above: a test may put another one in its place.
        monkeypatch.setattr(module, "upload_folder", lambda **kwargs: found.upload_folder(**kwargs))
    return found


@pytest.mark.parametrize("blocking", [True, False])
def test_the_hub_gets_the_student_alone(tmp_path, hub, blocking):
    joint = trainer(tmp_path, save_teacher=True)
    joint.train()
    joint.hub_model_id, teacher = "me/student", tmp_path / "teacher" / "model.safetensors"
    joint.push_to_hub(blocking=blocking)
    while hub.queue:
        assert not teacher.exists()
        hub.queue.pop(0)()
    assert "model.safetensors" in hub.seen[0]
    assert not [name for name in hub.seen[0] if "teacher" in name]
    assert teacher.exists()
    assert not (tmp_path / "_teacher").exists()
    joint.push_to_hub(include_teacher=True)
    assert "teacher/model.safetensors" in hub.seen[1]


def test_an_upload_that_fails_leaves_the_teacher_in_place(tmp_path, hub, monkeypatch):
    joint = trainer(tmp_path, save_teacher=True)
    joint.train()
    joint.hub_model_id = "me/student"

    def fail(**kwargs):
        raise OSError("offline")

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(OSError, match="offline"):
        joint.push_to_hub()
    assert (tmp_path / "teacher" / "model.safetensors").exists()
