"""The law of every method on every architecture: its record alone gives the module tree back, and files keep it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from tests.conftest import ALIKE, ARCHITECTURES, HEADS
from tests.contract.conftest import (
    CHANGEABLE,
    KEEPS_DENSE_MODULES,
    KEEPS_DENSE_SHAPES,
    METHOD_CONFIGS,
    REFUSED,
    assert_same_outputs,
    logits_of,
    precise,
)
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


GROUPED = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "eurobert"}
GATED = GROUPED | {"modernbert", "nomic_bert", "gte"}

every_head = pytest.mark.parametrize("head", list(HEADS))


def test_every_method_has_a_row():
    assert set(METHOD_CONFIGS) == set(hc.METHODS)
    for name, make in METHOD_CONFIGS.items():
        assert hc.METHODS[name].name == name
        assert type(make()) is hc.METHODS[name].config_class


@pytest.mark.parametrize(("name", "architecture"), list(REFUSED))
def test_refused_combinations(model, batches, name, architecture):
    dense = model(architecture)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSED[name, architecture]):
        hc.compress(dense, METHOD_CONFIGS[name](), data=batches(dense.config))
    after = dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert hc.steps_of(dense) == []


@every_head
def test_state_loads_strictly_into_a_rebuilt_skeleton(compressed, batch, method, architecture, head):
    model = compressed(method, architecture, head)
    config = type(model.config).from_dict(json.loads(model.config.to_json_string(use_diff=False)))
    skeleton = HEADS[head].from_config(config)
    dense_shapes = {name: value.shape for name, value in skeleton.state_dict().items()}
    same = dense_shapes == {name: value.shape for name, value in model.state_dict().items()}
    assert same == (method in KEEPS_DENSE_MODULES)
    hc.rebuild(skeleton).load_state_dict(model.state_dict(), strict=True)
    assert_same_outputs(skeleton, model, batch(model))
    with torch.device("meta"):
        empty = hc.rebuild(HEADS[head].from_config(config))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


@every_head
def test_saved_and_reloaded(compressed, batch, method, architecture, head, tmp_path):
    model = compressed(method, architecture, head)
    model.save_pretrained(tmp_path / "first")
    reloaded = HEADS[head].from_pretrained(tmp_path / "first")
    assert_same_outputs(reloaded, model, batch(model))
    assert hc.steps_of(reloaded) == hc.steps_of(model)
    reloaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("first", "second")
    ]
    assert records[0] == records[1]
    assert set(records[0]) == {"quant_method", "version", "steps"}
    if AutoModel._model_mapping[type(model.config)].base_model_prefix != model.base_model_prefix:
        return  # Llama for question answering: AutoModel does not find its weights, dense ones neither.
    base = AutoModel.from_pretrained(tmp_path / "first")
    ours, theirs = (logits_of(part, batch(model))[0] for part in (base, model.base_model))
    if method == "token_pruning" and head == "sequence_classification":
        # The last layer computes what the head reads and nothing else, in products of other shapes.
        torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-5)
        return
    assert_equal_to_rounding(ours, theirs)


FRESH = """
import json, sys
import torch
import hf_compress
from pathlib import Path
from safetensors.torch import load_file, save_file
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
loaded = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    seen = load_file(folder / "seen" / "batch.safetensors")
    with torch.no_grad():
        found = {"logits": model(**seen).logits, **model.state_dict()}
    save_file({name: value.clone() for name, value in found.items()}, folder / "seen" / "found.safetensors")
    loaded.append(folder.name)
print(json.dumps(loaded))
"""

WITHOUT_IMPORT = """
import json, sys
from pathlib import Path
import transformers
loaded = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        getattr(transformers, kind).from_pretrained(folder)
        loaded.append(folder.name)
    except RuntimeError as error:
        assert "mismatch" in str(error).lower(), error
assert "hf_compress" not in sys.modules
print(json.dumps(loaded))
"""


@pytest.mark.parametrize(
    "program",
    [pytest.param(FRESH, marks=pytest.mark.slow, id="with import"), pytest.param(WITHOUT_IMPORT, id="without import")],
)
def test_fresh_process(compressed, batch, tmp_path, program):
    head, models = "sequence_classification", {}
    for method in METHOD_CONFIGS:
        for architecture in ARCHITECTURES:
            if (method, architecture) in REFUSED or architecture in ALIKE:
                continue
            model, folder = compressed(method, architecture, head), tmp_path / f"{method}-{architecture}"
            models[folder.name] = model
            model.save_pretrained(folder)
            (folder / "seen").mkdir()
            save_file(batch(model), folder / "seen" / "batch.safetensors")
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    opened = json.loads(done.stdout.strip().splitlines()[-1])
    if program is WITHOUT_IMPORT:
        # None opens whose shapes changed; the others are dense models then.
        assert opened == sorted(name for name in models if name.partition("-")[0] in KEEPS_DENSE_SHAPES)
        assert "hf_compress" in done.stderr
        return
    assert opened == sorted(models)
    for name, model in models.items():
        found = load_file(tmp_path / name / "seen" / "found.safetensors")
        assert_equal_to_rounding(found.pop("logits"), logits_of(model, batch(model))[0])
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_config_round_trip(compressed, method, architecture, tmp_path):
    model = compressed(method, architecture)
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    steps = hc.steps_of(config)
    assert steps == hc.steps_of(model)
    assert [step["method"] for step in steps] == [method]
    assert json.loads(json.dumps(steps)) == steps
    assert config.hidden_size == 32
    dense = AutoModel.from_config(config)
    same = {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert same == (method in KEEPS_DENSE_MODULES)


def test_copies_and_casts(compressed, batch, method, architecture, tmp_path):
    model = compressed(method, architecture)
    seen = batch(model)
    twin = copy.deepcopy(model)
    assert_same_outputs(twin, model, seen)
    # One number of each embedding: norms would undo a shift of all. Scales are read once.
    values = next(p.data for name, p in twin.named_parameters() if p.ndim in (2, 4) and "scales" not in name)
    (values[:, 0] if values.ndim == 2 else values[0]).add_(1)
    assert hc.steps_of(twin) == hc.steps_of(model)
    assert differ_beyond_rounding(logits_of(twin, seen)[0], logits_of(model, seen)[0])
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert getattr(reloaded, "hf_quantizer", None) is None
    assert not getattr(reloaded, "is_quantized", False)
    assert {p.dtype for p in copy.deepcopy(reloaded).half().parameters()} == {torch.float16}
    assert {p.dtype for p in reloaded.double().parameters()} == {torch.float64}
    halved = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in halved.named_parameters() if not precise(name)} == {torch.bfloat16}
    assert {p.dtype for name, p in halved.named_parameters() if precise(name)} <= {torch.float32}
    assert torch.isfinite(logits_of(halved, seen)[0]).all()


def test_padding_and_batch_mates_change_nothing(compressed, batch, method, architecture):
    model = compressed(method, architecture).double()
    seen = batch(model)
    together = logits_of(model, seen)[0]
    for row in range(len(together)):
        alone = {name: value[row : row + 1] for name, value in seen.items()}
        if "attention_mask" in seen:
            alone = {name: value[:, : int(seen["attention_mask"][row].sum())] for name, value in alone.items()}
        expected = logits_of(model, alone)[0][0]
        assert torch.allclose(expected, together[row, : len(expected)], rtol=0, atol=1e-10)


def test_cost_equals_a_hand_count(compressed, model, method, architecture):
    s, d, dh = 20, 32, 8
    if method in KEEPS_DENSE_SHAPES:
        pytest.skip("counted in the tests of the method")
    for counted in (model(architecture), compressed(method, architecture)):
        cost, expected = hc.count_cost(counted, seq_len=s), []
        for block in layers_of(counted):
            neurons = block.num_neurons * s * d * (3 if architecture in GATED else 2)
            # ModernBERT's local layers see four tokens to each side.
            local = getattr(block.attention, "sliding_window", None) is not None
            pairs = sum(abs(i - j) <= 4 for i in range(s) for j in range(s)) if local else s * s
            # A unit is two query heads on one key and one value head, or one head.
            per_unit = 3 * s * d * dh + 2 * pairs * dh + s * dh * d
            if architecture in GROUPED:
                per_unit = s * d * 4 * dh + 2 * pairs * 2 * dh + s * 2 * dh * d
            if architecture == "deberta-v2":
                # Sixteen embeddings of distances, projected as queries and keys, each compared with all tokens.
                per_unit += 2 * 16 * d * dh + 2 * s * 16 * dh
            expected.append(block.num_units * per_unit + neurons)
        assert cost.macs_by_layer == expected
        assert cost.macs == sum(expected)
        numbers = {value.data_ptr(): value for value in counted.parameters()}.values()
        assert cost.params == sum(value.numel() for value in numbers)
        assert cost.nonzero_params == sum(int((value != 0).sum()) for value in numbers)
        assert cost.bytes == 4 * cost.params
        # Embeddings of distances are projected once a batch.
        once = sum(2 * 16 * d * block.num_units * dh for block in layers_of(counted) if architecture == "deberta-v2")
        assert hc.count_cost(counted, seq_len=s, batch_size=3).macs == 3 * cost.macs - 2 * once
    with pytest.raises(ValueError, match="must be positive, got 0 and 1"):
        hc.count_cost(counted, seq_len=0)


@pytest.mark.parametrize("method", CHANGEABLE)
def test_two_steps_compose(compressed, batch, batches, method, architecture, tmp_path):
    model = compressed(method, architecture, "sequence_classification")
    hc.compress(model, hc.StructuredPruningConfig(mac_ratio=0.8), data=batches(model.config))
    assert [step["method"] for step in hc.steps_of(model)] == [method, "structured_pruning"]
    model.save_pretrained(tmp_path)
    assert_same_outputs(HEADS["sequence_classification"].from_pretrained(tmp_path), model, batch(model))


def test_two_configs_are_two_calls(model, batches, method):
    together, apart = model("bert"), model("bert")
    data, config = batches(together.config), METHOD_CONFIGS[method]
    if not hc.METHODS[method].repeatable:
        for first in (together, hc.compress(apart, config(), data=data)):
            steps = hc.steps_of(first)
            with pytest.raises(ValueError, match=f"must not repeat {method}"):
                hc.compress(first, config(), *[config()] * (not steps), data=data)
            assert hc.steps_of(first) == steps
        return
    hc.compress(together, config(), config(), data=data)
    hc.compress(hc.compress(apart, config(), data=data), config(), data=data)
    assert hc.steps_of(together) == hc.steps_of(apart)
    assert len(hc.steps_of(together)) == 2
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))
