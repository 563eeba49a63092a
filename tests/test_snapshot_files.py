"""Every snapshot's files are looked at before the training begins; a teacher never gets weights from nowhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from hf_compress.training.snapshots import check_snapshots, open_snapshot
from tests.guided_setup import dense, linear, trainer_of


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_bin(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_shards(folder):
    (folder / "model.safetensors").unlink()
    dense(13, 0.1).save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", {"format": "pt"})


def under_module(folder):
    change(folder, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})


def without_a_layer(folder):
    change(folder, lambda tensors: {name: value for name, value in tensors.items() if "layer.1" not in name})


def without_a_head(folder):
    change(folder, lambda tensors: {name: value for name, value in tensors.items() if "classifier" not in name})


def narrower(folder):
    change(folder, lambda tensors: {name: value[..., :-1].contiguous() for name, value in tensors.items()})


def cut_bin(folder):
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])


def malicious(folder):
    class Bomb:
        def __reduce__(self):
            return (open, (str(folder.parent / "exploded"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"bert.x": Bomb()}, folder / "pytorch_model.bin")


def a_shard_less(folder):
    to_shards(folder)
    next(folder.glob("model-00002-*")).unlink()


def broken_index(folder):
    to_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')


def broken_config(folder):
    (folder / "config.json").write_text("{")


def no_class(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))


DAMAGES = (cut, under_module, without_a_layer, without_a_head, narrower, cut_bin, malicious, a_shard_less,
           broken_index, broken_config, no_class)  # fmt: skip


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_snapshot_is_refused_before_the_start(tmp_path, saved_states, damage, place):
    folder = tmp_path / "saved_states" / ("checkpoint-2", "checkpoint-9", "checkpoint-10")[place]
    damage(folder)
    with pytest.raises(ValueError, match=f"teacher_snapshots must be .*{folder.name}'") as caught:
        trainer_of("snapshots", tmp_path, linear(0), teacher_snapshots=[saved_states], alpha_output=1.0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved_states" / "exploded").exists()


def test_files_of_other_kinds_are_snapshots_too(tmp_path, saved_states):
    to_bin(tmp_path / "saved_states" / "checkpoint-9")
    to_shards(tmp_path / "saved_states" / "checkpoint-10")
    trainer_of("snapshots", tmp_path, linear(0), teacher_snapshots=[saved_states], num_train_epochs=2).train()


def test_later_snapshots_are_not_opened_before_their_turn(tmp_path, saved_states, monkeypatch):
    folders = [str(tmp_path / "saved_states" / f"checkpoint-{number}") for number in (2, 9, 10)]
    first = open_snapshot(folders[0])
    monkeypatch.setattr("hf_compress.training.snapshots.open_snapshot", None)
    check_snapshots(folders, first)


def test_what_the_files_lack_is_named(tmp_path):
    """A head over an encoder's weights, and names that a wrapper left behind."""
    dense(1).save_pretrained(tmp_path / "whole")
    BertModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "encoder")
    assert type(open_snapshot(str(tmp_path / "encoder"))) is BertModel
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "encoder" / "config.json")
    with pytest.raises(ValueError, match=r"lack classifier.bias, classifier.weight, which would be random"):
        open_snapshot(str(tmp_path / "encoder"))
    under_module(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"lack .* more, which would be random; they hold tensors .* reads: module."):
        open_snapshot(str(tmp_path / "whole"))


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = dense(1)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got NaN or infinity in classifier.bias"):
        open_snapshot(str(tmp_path))
