"""Models made of one model and the same examples share a pass over the examples, and come out the same."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.core.shared_passes import shared_passes
from tests.recipe_files import PRUNED, UNTRAINED, write_place, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    write_place(root)
    before = os.getcwd()
    os.chdir(root)
    yield root
    os.chdir(before)


@pytest.fixture
def opened(place):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained("classifier").eval()
    ids = torch.randint(5, model.config.vocab_size, (4, 8, 12))
    return model, [{"input_ids": each, "labels": torch.tensor([0, 1] * 4)} for each in ids]


def cut(model, batches, counted, **settings):
    """A pruned copy; appends how often the base model ran."""
    own = copy.deepcopy(model)
    calls = []
    handle = own.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    hc.compress(own, hc.StructuredPruningConfig(**settings), data=batches)
    handle.remove()
    counted.append(len(calls))
    return own.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("settings", "passes"), [
    ({"selection": "interpolative"}, 4), ({"selection": "magnitude"}, 4), ({"selection": "random"}, 4),
    ({"selection": "fisher", "correction": False}, 4),
])  # fmt: skip
def test_a_second_cut_leaves_the_pass_out_and_comes_out_the_same(opened, settings, passes):
    model, batches = opened
    alone, together = [], []
    separate = [cut(model, batches, alone, mac_ratio=ratio, **settings) for ratio in (0.7, 0.5)]
    with shared_passes():
        shared = [cut(model, batches, together, mac_ratio=ratio, **settings) for ratio in (0.7, 0.5)]
    assert alone == [passes, passes]
    assert together == [passes, 0]
    assert all(equal(one, other) for one, other in zip(shared, separate, strict=True))
    assert not equal(*shared)


@pytest.mark.parametrize("target", ["self", "dense"])
def test_a_second_budget_by_divergence_asks_about_single_cuts_no_more(opened, target):
    model, batches = opened
    alone, together = [], []
    settings = {"allocation": "divergence", "target": target}
    separate = [cut(model, batches, alone, mac_ratio=ratio, **settings) for ratio in (0.7, 0.5)]
    with shared_passes():
        shared = [cut(model, batches, together, mac_ratio=ratio, **settings) for ratio in (0.7, 0.5)]
    assert together[0] == alone[0]
    assert together[1] < alone[1] / 2
    assert all(equal(one, other) for one, other in zip(shared, separate, strict=True))


def test_what_was_measured_of_something_else_is_not_taken(opened):
    model, batches = opened
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.embeddings.word_embeddings.weight[7, 0] += 1e-3
    counted = []
    with shared_passes():
        cut(model, batches, counted, mac_ratio=0.7)
        cut(other, batches, counted, mac_ratio=0.7)
        cut(other, batches[:3], counted, mac_ratio=0.7)
        cut(other, batches[:3], counted, mac_ratio=0.7, center=True)
        # Each layer is measured as the layers below it were left, so nothing is shared.
        cut(other, batches[:3], counted, mac_ratio=0.7, order="sequential")
        cut(other, batches[:3], counted, mac_ratio=0.5, order="sequential")
    cut(other, batches[:3], counted, mac_ratio=0.5, center=True)
    assert counted[:4] == [4, 4, 3, 3]
    assert all(calls > 0 for calls in counted)


def test_a_one_shot_iterator_is_read_once(opened):
    model, batches = opened
    with shared_passes():
        found = cut(model, iter(batches), [], mac_ratio=0.7)
    assert equal(found, cut(model, batches, [], mac_ratio=0.7))


def test_members_of_a_family_are_those_of_separate_commands(place):
    family = {**PRUNED, "model_name_or_path": "classifier", "mac_ratio": [0.7, 0.5], "ridge": 0.01}
    assert main(["run", write_recipe(place / "recipe.yaml", family, **UNTRAINED)]) == 0
    common = "--model_name_or_path classifier --data_dir data --max_length 16 --device cpu --ridge 0.01"
    for ratio in ("0.7", "0.5"):
        assert main(f"prune-structure {common} --mac_ratio {ratio} --output_dir {ratio}".split()) == 0
        weights = [Path(folder, "model.safetensors").read_bytes() for folder in (f"out/pruned-{ratio}", ratio)]
        assert weights[0] == weights[1]
