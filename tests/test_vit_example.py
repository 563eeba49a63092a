"""The example of images runs as a person runs it, with a few updates of each training."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

import hf_compress as hc


pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "vit_digits.py"


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--out", "digits", "--seeds", "0", "1", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *flags])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    # 17 tokens; 4 layers of 17 (4 * 64 * 64 + 2 * 64 * 256) + 2 * 17 * 17 * 64.
    dense, left = (
        int(number.replace(",", "")) for number in re.search(r"([\d,]+) multiply.*?-> ([\d,]+),", printed).groups()
    )
    assert dense == 3490304
    assert 0.49 * dense < left <= 0.5 * dense
    table = [
        line.split(maxsplit=1) for line in printed.splitlines() if re.match(r"(dense|pruned|recovered|reopened)", line)
    ]
    assert [name for name, _ in table] == ["dense", "pruned", "recovered", "reopened"]
    assert table[2][1] == table[3][1]
    assert all(re.fullmatch(r"validation \S+ \+- \S+ \(.*\) test \S+ \+- \S+ \(.*\)", numbers) for _, numbers in table)
    model = AutoModelForImageClassification.from_pretrained("digits/seed-1")
    assert hc.steps_of(model)[0]["seq_len"] == 17


def test_the_splits_are_disjoint_and_fixed(tmp_path):
    example = runpy.run_path(str(EXAMPLE))
    first, again = example["load_splits"](), example["load_splits"]()
    assert {name: len(rows) for name, rows in first.items()} == {"train": 1097, "validation": 300, "test": 400}
    pixels = torch.cat([rows["pixel_values"][:] for rows in first.values()])
    assert pixels.shape == (1797, 1, 8, 8)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    assert len(pixels.flatten(1).unique(dim=0)) == 1797
    for name, rows in first.items():
        assert torch.equal(rows["pixel_values"][:], again[name]["pixel_values"][:])
        assert rows["labels"][:].bincount().min() > 0.09 * len(rows)
