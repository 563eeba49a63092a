"""Models that are compressed layer by layer from their files: equal to those compressed in memory, and never torn."""

import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress import layer_by_layer
from hf_compress.core.layer_store import LayerStore
from tests import layers_program
from tests.conftest import ARCHITECTURES
from tests.layers_program import PRUNING, calibration
from tests.rounding import assert_compressed_alike


def saved(place, architecture="llama", kind=AutoModelForCausalLM, dtype=torch.float32, shards="20KB"):
    torch.manual_seed(0)
    model = kind.from_config(ARCHITECTURES[architecture](), dtype=dtype).eval()
    model.save_pretrained(place / "source", max_shard_size=shards)
    (place / "source" / "tokenizer.json").write_text("{}")
    return place / "source"


def files_of(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("architecture", "kind", "settings"),
    [
        ("llama", AutoModelForCausalLM, {}),
        ("llama", AutoModelForCausalLM, {"selection": "random", "mac_ratio": 0.5}),
        ("llama", AutoModelForCausalLM, {"dtype": torch.bfloat16, "ridge": 0.01}),
        ("opt", AutoModelForCausalLM, {"center": True, "allocation": "uniform"}),
        ("opt", AutoModelForCausalLM, {"shards": "1GB", "min_heads": 0, "min_neurons": 0, "mac_ratio": 0.2}),
        ("gpt2", AutoModelForCausalLM, {"selection": "magnitude"}),
        ("llama", AutoModelForCausalLM, {"order": "one_shot", "target": "dense"}),
        ("deberta-v2", AutoModelForSequenceClassification, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_result_is_that_of_compress(tmp_path, architecture, kind, settings):
    saving = {name: settings[name] for name in ("dtype", "shards") if name in settings}
    start = saved(tmp_path, architecture, kind, **saving)
    pruning = {name: value for name, value in settings.items() if name not in saving}
    config = hc.StructuredPruningConfig(**PRUNING | pruning)
    folder = hc.compress_folder(start, tmp_path / "out", config, data=iter(calibration()))
    found, told = kind.from_pretrained(folder, output_loading_info=True)
    expected = hc.compress(kind.from_pretrained(start), config, data=calibration())
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert_compressed_alike(found, expected)
    expected.save_pretrained(tmp_path / "expected")
    assert (folder / "config.json").read_text() == (tmp_path / "expected" / "config.json").read_text()
    assert (folder / "tokenizer.json").is_file()
    assert "**structured_pruning**" in (folder / "README.md").read_text()
    assert not (folder / layer_by_layer.UNFINISHED).exists()


def test_the_files_are_named_as_transformers_names_them(source, tmp_path):
    folder = hc.compress_folder(source, tmp_path / "out", hc.StructuredPruningConfig(**PRUNING), data=calibration())
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="1GB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "again" / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
            assert shard.metadata()["format"] == "pt"


def test_two_steps_one_after_the_other(source, tmp_path):
    steps = [hc.StructuredPruningConfig(**PRUNING | {"mac_ratio": ratio}) for ratio in (0.8, 0.6)]
    folder = hc.compress_folder(source, tmp_path / "out", *steps, data=calibration())
    expected = hc.compress(AutoModelForCausalLM.from_pretrained(source), *steps, data=calibration())
    assert_compressed_alike(AutoModelForCausalLM.from_pretrained(folder), expected)
    assert [step["mac_ratio"] for step in hc.steps_of(expected)] == [0.8, 0.6]


def test_a_ratio_of_one_changes_nothing(source, tmp_path):
    folder = hc.compress_folder(source, tmp_path / "out", hc.StructuredPruningConfig(mac_ratio=1.0))
    found = AutoModelForCausalLM.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in found.state_dict().items())
    assert hc.steps_of(found)[0]["mac_ratio"] == 1.0


def test_one_layer_is_loaded_at_a_time(source, tmp_path, monkeypatch):
    loaded, most = set(), []
    load, drop = LayerStore.load_, LayerStore.drop_

    def loading(store, index):
        load(store, index)
        loaded.add(index)
        resident = [any(not p.is_meta for p in layer.parameters()) for layer in store._layers]
        most.append((sum(resident), len(loaded)))

    def dropping(store, index, done):
        drop(store, index, done)
        loaded.discard(index)

    monkeypatch.setattr(LayerStore, "load_", loading)
    monkeypatch.setattr(LayerStore, "drop_", dropping)
    hc.compress_folder(source, tmp_path / "out", hc.StructuredPruningConfig(**PRUNING), data=calibration())
    # Two layers, each for its ranking and for its cut.
    assert most == [(1, 1)] * 4


# Forked: a new interpreter would import everything anew.
def run_until(source, target, moment):
    """Exit code of a run that ends itself at a moment."""
    process = multiprocessing.get_context("fork").Process(
        target=layers_program.compress, args=(str(source), str(target), moment)
    )
    process.start()
    process.join()
    return process.exitcode


def kills(source, tmp_path, moments):
    """Kill a run at each of the moments in turn, let it end, and compare with a run that was left alone."""
    assert run_until(source, tmp_path / "whole", -1) == 0
    for moment in moments:
        assert run_until(source, tmp_path / "out", moment) == 9
        with pytest.raises((OSError, ValueError), match="no file named|config.json"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert run_until(source, tmp_path / "out", -1) == 0
    found = files_of(tmp_path / "out")
    assert found == files_of(tmp_path / "whole")
    assert not any("incomplete" in name for name in found)


def test_killed_runs_end_in_the_same_bytes(source, tmp_path):
    kills(source, tmp_path, [3, 9, 13, 17])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_run_may_be_killed_at_any_moment(tmp_path, architecture):
    start = saved(tmp_path, architecture)
    assert run_until(start, tmp_path / "whole", -1) == 0
    expected, moment = files_of(tmp_path / "whole"), 0
    while True:
        target = tmp_path / f"out-{moment}"
        code = run_until(start, target, moment)
        if code == 0:
            break
        assert code == 9
        assert run_until(start, target, -1) == 0
        assert files_of(target) == expected, moment
        shutil.rmtree(target)
        moment += 1
    assert moment > 30


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "rtn", "group_size": 8},
        {"algorithm": "gptq", "bits": 3, "group_size": -1},
        {"algorithm": "gptq", "correction": "dense", "group_size": 16},
    ],
    ids=["rtn", "gptq", "dense"],
)
def test_pruned_and_quantised_layers_are_those_of_compress(source, tmp_path, settings):
    steps = [hc.StructuredPruningConfig(**PRUNING), hc.WeightQuantizationConfig(**settings)]
    folder = hc.compress_folder(source, tmp_path / "out", *steps, data=calibration())
    expected = hc.compress(AutoModelForCausalLM.from_pretrained(source), *steps, data=calibration())
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert_compressed_alike(found, expected)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_second_run_loads_no_layer_again(source, tmp_path, monkeypatch):
    target, config = tmp_path / "out", hc.StructuredPruningConfig(**PRUNING)
    loads, load = [], LayerStore.load_

    def failing(store, index):
        loads.append(index)
        if len(loads) == 4:
            raise KeyboardInterrupt
        load(store, index)

    monkeypatch.setattr(LayerStore, "load_", failing)
    with pytest.raises(KeyboardInterrupt):
        hc.compress_folder(source, target, config, data=calibration())
    hc.compress_folder(source, target, config, data=calibration())
    # Ranked 0 and 1, cut 0; the second run goes on with the cut of 1.
    assert loads == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("change", ["configs", "data", "source"])
def test_unfinished_work_of_other_inputs_is_refused(source, tmp_path, change):
    assert run_until(source, tmp_path / "out", 9) == 9
    start, ratio = source, 0.7 if change == "configs" else 0.6
    if change == "source":
        start = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy)
    config = hc.StructuredPruningConfig(**PRUNING | {"mac_ratio": ratio})
    with pytest.raises(ValueError, match=rf"unfinished work of a run with other inputs \({change} differs\)"):
        hc.compress_folder(start, tmp_path / "out", config, data=calibration(count=2 if change == "data" else 3))


# Name -> what is done to the folder of a saved model, and the message.
def _torn(folder):
    file = sorted(folder.glob("model-*"))[1]
    file.write_bytes(file.read_bytes()[:-8])


def _missing(folder):
    sorted(folder.glob("model-*"))[1].unlink()


def _with_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def _in_layer(folder, change):
    """Change the first tensor of a layer where it is saved."""
    name = "model.layers.1.mlp.down_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


BROKEN = {
    "torn": (_torn, r"model-0000\d-of-000\d\d.safetensors in '.*' is torn or no file of safetensors"),
    "missing": (_missing, r"model-0000\d-of-000\d\d.safetensors is missing in"),
    "shape": (lambda f: _in_layer(f, lambda t: t[:, 1:].contiguous()), r"layers.1.*has shape \[32, 63\] instead of"),
    "dtype": (
        lambda f: _in_layer(f, lambda t: t.to(torch.int8)),
        "must be floating-point numbers, got I8 in model.la",
    ),
    "nan": (
        lambda f: _in_layer(f, lambda t: t * float("nan")),
        "must be finite, got NaN or infinity in model.layers.1",
    ),
    "foreign": (
        lambda f: _with_index(f, lambda m: m.update({"model.layers.7.weight": m["model.norm.weight"]})),
        "holds model.layers.7.weight, but it does not",
    ),
    "outside": (
        lambda f: _with_index(f, lambda m: m.update({"model.norm.weight": "../other.safetensors"})),
        r"names '../other.safetensors' for model.norm.weight",
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json of '.*' is broken"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json in '.*' cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_end_in_one_line(source, tmp_path, kind):
    start = shutil.copytree(source, tmp_path / "copy")
    BROKEN[kind][0](start)
    with pytest.raises(ValueError, match=BROKEN[kind][1]) as caught:
        hc.compress_folder(start, tmp_path / "out", hc.StructuredPruningConfig(**PRUNING), data=calibration())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_lacking_tensor_is_named(source, tmp_path):
    start = shutil.copytree(source, tmp_path / "copy")
    _with_index(start, lambda names: names)
    name = "model.layers.1.mlp.down_proj.weight"
    file = start / json.loads((start / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    _with_index(start, lambda names: names.pop(name))
    with pytest.raises(ValueError, match=rf"layer by layer: its weight files lack {name}"):
        hc.compress_folder(start, tmp_path / "out", hc.StructuredPruningConfig(**PRUNING), data=calibration())


@pytest.mark.parametrize(
    ("configs", "data", "message"),
    [
        ([], calibration(), "configs must name at least one step"),
        ([hc.StructuredPruningConfig(**PRUNING)], None, "data must be given"),
        ([hc.StructuredPruningConfig(**PRUNING)], [], "at least one batch"),
        ([hc.StructuredPruningConfig(**PRUNING)], [{"labels": torch.ones(2)}], "dicts with input_ids"),
        ([hc.StructuredPruningConfig(**PRUNING)], [{"input_ids": torch.ones(1, 9).long()}], "at least 128 tokens"),
        ([hc.StructuredPruningConfig(mac_ratio=0.6)], calibration(), "order must be 'sequential' layer by layer"),
        ([hc.StructuredPruningConfig(**PRUNING | {"mac_ratio": 0.01})], calibration(), "mac_ratio must be at least"),
        ([hc.StructuredPruningConfig(selection="fisher")], calibration(), "order must be 'sequential'"),
        ([hc.StructuredPruningConfig(**PRUNING, allocation="divergence")], calibration(), "allocation must be"),
        ([hc.LinformerConfig()], None, "linformer cannot work layer by layer"),
    ],
)  # fmt: skip
def test_impossible_work_is_refused(source, tmp_path, configs, data, message):
    with pytest.raises(ValueError, match=message):
        hc.compress_folder(source, tmp_path / "out", *configs, data=data)
    # Settings that are possible must not find the work of these.
    assert not (tmp_path / "out" / layer_by_layer.UNFINISHED).exists()


def test_a_source_must_be_another_folder_with_a_known_model(source, tmp_path):
    config = hc.StructuredPruningConfig(**PRUNING)
    with pytest.raises(ValueError, match="is the folder of source"):
        hc.compress_folder(source, source, config, data=calibration())
    with pytest.raises(ValueError, match="got a LlamaForCausalLM: use compress"):
        hc.compress_folder(AutoModelForCausalLM.from_pretrained(source), tmp_path / "out", config, data=calibration())
    with pytest.raises(ValueError, match="source must be a folder"):
        hc.compress_folder(tmp_path / "nothing", tmp_path / "out", config, data=calibration())
    start = saved(tmp_path, "nomic_bert", AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match="layer by layer: its weight files lack .* Open the model whole"):
        hc.compress_folder(start, tmp_path / "out", config, data=calibration())


def peak_of(folder, layers, told):
    """Bytes that a process which prunes a model needs at most, beyond what it has after the imports."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source", max_shard_size="8MB")
    process = multiprocessing.get_context("spawn").Process(
        target=layers_program.measure, args=(str(folder / "source"), str(folder / "out"), str(told))
    )
    process.start()
    process.join()
    return int(told.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read where Linux tells it")
def test_memory_does_not_grow_with_the_layers(tmp_path):
    few, many = (peak_of(tmp_path / str(n), n, tmp_path / f"{n}.txt") for n in (8, 30))
    layer = 4 * (4 * 512**2 + 3 * 512 * 1024)
    # 22 more layers, and not the room for eight of them: what the heap keeps varies by a few.
    assert many - few < 8 * layer
