"""Methods read windows from random places of a running text. The oracle is the published draw, written out again."""

import json
import random

import pytest
from transformers import AutoConfig

from hf_compress.cli.main import main
from hf_compress.tasks import language_modeling
from hf_compress.tasks.sources import DataArguments, load_task


TEXT = "good film bad plot . the cast was good , a bad film . "
CUT = "prune-structure --model_name_or_path writer --output_dir cut --mac_ratio 0.7 --device cpu"


@pytest.fixture
def place(tmp_path, monkeypatch, model, tokenizer):
    """A folder with a causal language model and two texts."""
    monkeypatch.chdir(tmp_path)
    model("opt", "causal_lm").save_pretrained("writer")
    tokenizer.save_pretrained("writer")
    (tmp_path / "story.txt").write_text(TEXT * 40)
    (tmp_path / "other.txt").write_text("the plot was bad . " * 60)
    return tmp_path


def text_task(**files):
    return load_task(DataArguments(**files), AutoConfig.from_pretrained("writer"))


def test_windows_are_those_of_the_published_draw(place, tokenizer):
    ids = tokenizer(TEXT * 40)["input_ids"]
    rows = text_task(train_file="story.txt").random_windows(tokenizer, 32, count=7, seed=3)
    random.seed(3)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(7)]
    assert rows["input_ids"][:] == [ids[start : start + 32] for start in starts]
    assert text_task(train_file="story.txt", separate_rows=True).random_windows(tokenizer, 32, 7, 3) is None


def test_a_window_may_be_the_whole_text(place, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    (place / "short.txt").write_text(TEXT)
    task = text_task(train_file="short.txt")
    assert task.random_windows(tokenizer, len(ids), 2, 0)["input_ids"][:] == [ids, ids]
    with pytest.raises(ValueError, match=f"{len(ids)} tokens, fewer than one window of {len(ids) + 1}"):
        task.random_windows(tokenizer, len(ids) + 1, 2, 0)


def test_of_much_text_enough_is_read(place, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(language_modeling, "_CALIBRATION_TEXT", 100)
    monkeypatch.setattr(language_modeling, "tokenizer_for", lambda *args: lambda text, **k: read.append(text) or {
        "input_ids": list(range(len(text)))})  # fmt: skip
    lines = [f"line {number:04d}" for number in range(300)]
    (place / "long.txt").write_text("\n".join(lines))
    task = text_task(train_file="long.txt")
    for seed in (0, 0, 1):
        task.random_windows(tokenizer, 8, 2, seed)
    assert read[0] == read[1] != read[2]
    # Whole rows from everywhere, and not many more characters than are enough.
    assert set(read[0].split("\n")) < set(lines)
    assert 100 <= len(read[0].replace("\n", "")) < 110


def test_one_text_calibrates_and_another_one_measures(place, capsys):
    assert main(f"{CUT} --train_file story.txt --calibration_samples 40 --max_length 32".split()) == 0
    results = json.loads((place / "cut" / "results.json").read_text())
    facts = {"calibration_samples": 40, "calibration_seed": 0, "calibration_context": 32}
    assert facts.items() <= results.items()
    # Every window is whole.
    assert results["step"]["seq_len"] == 32
    command = "evaluate --models writer cut --task_name other.txt --device cpu --output_file out.json"
    assert main(command.split()) == 0
    found = json.loads((place / "out.json").read_text())
    assert found["writer"]["predicted_tokens"] == found["cut"]["predicted_tokens"] > 0


def test_left_out_the_published_number_of_windows_is_drawn(place):
    assert main(f"{CUT} --train_file story.txt".split()) == 0
    results = json.loads((place / "cut" / "results.json").read_text())
    # The model has 66 positions, its tokenizer takes 64.
    assert (results["calibration_samples"], results["calibration_context"]) == (128, 64)


def test_there_is_no_text_to_calibrate_on(place, capsys):
    assert main(f"{CUT} --task_name story.txt".split()) == 2
    message = capsys.readouterr().err
    assert "The task 'story' has no train split to calibrate on, only validation" in message
    assert "name a text with train_file, in place of data_dir" in message
