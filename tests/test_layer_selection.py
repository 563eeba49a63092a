"""Shallower models equal models built by hand from the chosen layers, and stock transformers opens them."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.core.architectures import architecture_of, layers_of
from hf_compress.methods.layer_selection.spread import even_layers
from tests.conftest import ARCHITECTURES, HEADS, _batches
from tests.contract.conftest import assert_same_outputs, logits_of
from tests.images_and_sounds import cast
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding
from tests.test_bad_input import write_model


LAYERS = 4
DEPTH = {"distilbert": "n_layers", "gpt2": "n_layer"}
# Attention of two kinds, so that a layer must keep its own.
KINDS = {
    "modernbert": {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "opt")


def deep(architecture, head="base"):
    """A seeded model of four layers that differ."""
    try:
        config = ARCHITECTURES[architecture]()
    except ValueError:
        pytest.skip(f"this release of transformers has no {architecture}")
    values = {**config.to_dict(), DEPTH.get(architecture, "num_hidden_layers"): LAYERS, "layer_types": None}
    values = {**values, "no_rope_layers": None, **KINDS.get(architecture, {})}
    config = type(config)(**{name: value for name, value in values.items() if value is not None})
    if type(config) not in HEADS[head]._model_mapping:
        pytest.skip(f"transformers has no {head} model of {architecture}")
    torch.manual_seed(0)
    model = HEADS[head].from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def by_hand(teacher, kept):
    """A stock model of as many layers whose weights are copied name by name."""
    config = copy.deepcopy(teacher.config).to_dict()
    config[DEPTH.get(teacher.config.model_type, "num_hidden_layers")] = len(kept)
    for name in ("layer_types", "no_rope_layers"):
        if config.get(name):
            config[name] = [config[name][index] for index in kept]
    student = type(teacher)(type(teacher.config).from_dict(config)).eval()
    prefix = architecture_of(teacher).layers
    if student.base_model is not student:
        prefix = f"{student.base_model_prefix}.{prefix}"
    theirs, ours = teacher.state_dict(), {}
    for name in student.state_dict():
        place = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        source = name if place is None else f"{prefix}.{kept[int(place[1])]}.{name[place.end() :]}"
        ours[name] = theirs[source]
    student.load_state_dict(ours, strict=True)
    return student


@pytest.mark.parametrize("layers", ["even", "first", [0, 1], [0, 2, 3]], ids=str)
def test_equals_the_model_built_by_hand(architecture, layers):
    teacher = deep(architecture, "sequence_classification")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config, batch = teacher.config.to_dict(), _batches(teacher.config, 1)[0]
    student = hc.students.from_teacher(teacher, None if isinstance(layers, list) else 2, layers)
    kept = {"even": [0, 3], "first": [0, 1]}.get(str(layers), layers)
    step = {"method": "layer_selection", "num_layers": len(kept), "layers": layers, "kept_layers": kept}
    assert hc.steps_of(student) == [step]
    assert_same_outputs(student, by_hand(teacher, kept), batch)
    # The teacher is as it was, and shares nothing with its student.
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert differ_beyond_rounding(logits_of(student, batch)[0], logits_of(teacher, batch)[0])


def test_layers_in_the_middle(architecture):
    """Layers that lose their first one: ModernBERT's first has no norm, so it must stay."""
    teacher = deep(architecture)
    if architecture == "modernbert":
        message = r"layers must keep layer 0 at its place, got \[1, 3\]: as layer 0 of a modernbert, layer 1 has"
        with pytest.raises(ValueError, match=message):
            hc.students.from_teacher(teacher, layers=[1, 3])
        return
    student = hc.students.from_teacher(teacher, layers=[1, 3])
    assert_same_outputs(student, by_hand(teacher, [1, 3]), _batches(teacher.config, 1)[0])


def test_stock_transformers_opens_it(architecture, tmp_path):
    head = "sequence_classification"
    student = hc.students.from_teacher(deep(architecture, head), 2)
    assert hc.to_plain(student) is student
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config[DEPTH.get(student.config.model_type, "num_hidden_layers")] == 2
    again = HEADS[head].from_pretrained(tmp_path)
    assert_same_outputs(again, student, _batches(student.config, 1)[0])
    assert len(layers_of(again)) == 2


@pytest.mark.slow
def test_a_process_without_this_package_opens_it(tmp_path):
    student = hc.students.from_teacher(deep("qwen2", "causal_lm"), 2)
    hc.to_plain(student).save_pretrained(tmp_path)
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'hf_compress' not in sys.modules\n"
        "print(float(model(torch.arange(3, 20)[None]).logits.detach().double().square().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = float(student(torch.arange(3, 20)[None]).logits.detach().double().square().sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", DECODERS)
def test_generates_with_and_without_cache(architecture):
    teacher = deep(architecture, "causal_lm")
    student, expected = hc.students.from_teacher(teacher, layers=[1, 3]), by_hand(teacher, [1, 3])
    prompt = cast(_batches(teacher.config, 1, size=2, length=10)[0], teacher)
    prompt = {name: value[:, :5] for name, value in prompt.items()}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain, oracle = (
        model.generate(**prompt, **settings, use_cache=cache)
        for model, cache in ((student, True), (student, False), (expected, True))
    )
    assert cached.tolist() == plain.tolist() == oracle.tolist()
    past = student(**prompt, use_cache=True).past_key_values
    assert len(past.layers) == 2
    assert [past.get_seq_length(index) for index in range(2)] == [5, 5]


def test_weights_of_all_hidden_states(tmp_path):
    """A classifier of sounds that weighs the embeddings and all layers keeps the weights of those that are left."""
    teacher = deep("wav2vec2", "sequence_classification")
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), "use_weighted_layer_sum": True})
    teacher = type(teacher)(config).eval()
    teacher.layer_weights.data.copy_(torch.arange(5.0))
    student = hc.students.from_teacher(teacher, 2)
    assert student.layer_weights.tolist() == [0, 1, 4]
    student.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["layer_weights"].tolist() == [0, 1, 4]
    again = type(teacher).from_pretrained(tmp_path)
    assert_same_outputs(again, student, _batches(config, 1)[0])


def test_cost_is_that_of_the_layers_that_stay():
    teacher = deep("bert")
    whole, cost = hc.count_cost(teacher, 20), hc.count_cost(hc.students.from_teacher(teacher, 1), 20)
    assert cost.macs_by_layer == whole.macs_by_layer[:1]
    per_layer = sum(value.numel() for value in layers_of(teacher)[0].module.parameters())
    assert whole.params - cost.params == 3 * per_layer


def test_even_layers():
    assert even_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert even_layers(12, 12) == list(range(12))
    for total in range(2, 40):
        for number in range(2, total):
            chosen = even_layers(total, number)
            assert len(set(chosen)) == number
            assert (chosen[0], chosen[-1]) == (0, total - 1)
            exact = [place * (total - 1) / (number - 1) for place in range(number)]
            assert all(abs(layer - wanted) <= 0.5 for layer, wanted in zip(chosen, exact, strict=True))


def test_the_default_is_half_of_the_layers():
    assert hc.students.from_teacher(deep("bert")).config.num_hidden_layers == 2
    assert [hc.LayerSelectionConfig().chosen_of(total) for total in (5, 2)] == [[0, 2, 4], [1]]


REFUSED = {
    "none": ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    "all": ({"num_layers": 4}, "num_layers must be smaller than the number of the model's layers, 4, got 4"),
    "all listed": ({"layers": [0, 1, 2, 3]}, "must be smaller than the number of the model's layers, 4, got 4"),
    "a word": ({"layers": "middle"}, "layers must be one of 'even', 'first', 'last' or list.int., got 'middle'"),
    "behind the end": ({"layers": [0, 4]}, r"layers must be indices of the model's layers 0..3, got 4"),
    "negative": ({"layers": [-1]}, r"layers must be ascending indices from 0, got \[-1\]"),
    "twice": ({"layers": [1, 1]}, r"layers must be ascending indices from 0, got \[1, 1\]"),
    "backwards": ({"layers": [2, 1]}, r"layers must be ascending indices from 0, got \[2, 1\]"),
    "empty": ({"layers": []}, r"layers must be ascending indices from 0, got \[\]"),
    "two numbers": ({"layers": [0, 1], "num_layers": 3}, "num_layers must be 2, the number of layers that are listed"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refusals(case):
    settings, message = REFUSED[case]
    teacher = deep("bert")
    with pytest.raises(ValueError, match=message):
        hc.students.from_teacher(teacher, **settings)
    assert hc.steps_of(teacher) == []
    assert len(layers_of(teacher)) == 4


def test_refuses_a_model_that_went_through_a_method():
    teacher = hc.compress(deep("bert"), hc.LinformerConfig(projected_length=4))
    with pytest.raises(ValueError, match="layer_selection cannot follow linformer: it must be the first step"):
        hc.students.from_teacher(teacher, 2)


def test_refuses_attention_that_depends_on_the_place():
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": 99}
    teacher = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    with pytest.raises(ValueError, match="layers must be 'first' for a model with scale_attn_by_inverse_layer_idx"):
        hc.students.from_teacher(teacher, 2)
    student = hc.students.from_teacher(teacher, 2, "first")
    assert_equal_to_rounding(
        student(torch.arange(9)[None]).logits, by_hand(teacher, [0, 1])(torch.arange(9)[None]).logits
    )


@pytest.mark.parametrize("change", ["depth", "no record"])
def test_a_record_that_does_not_fit(tmp_path, change):
    hc.students.from_teacher(deep("bert"), 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if change == "depth":
        config["num_hidden_layers"], message = 3, "The model must have 2 layers, those that the record keeps, got 3"
    else:
        del config["quantization_config"]["steps"][0]["kept_layers"]
        message = "kept_layers must be recorded, got a config that was never applied"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        HEADS["base"].from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["encoder", "masked words", "classifier"])
def test_command(tmp_path, kind, capsys):
    write_model(tmp_path / "model")
    names = {"encoder": BertModel, "masked words": BertForMaskedLM, "classifier": BertForSequenceClassification}
    teacher = names[kind](AutoConfig.from_pretrained(tmp_path / "model"))
    teacher.save_pretrained(tmp_path / "model")
    line = ["layer-selection", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--layers", "1"]) == 0
    assert '"kept_layers": [1]' in capsys.readouterr().out
    student = names[kind].from_pretrained(tmp_path / "out")
    expected = hc.students.from_teacher(teacher, layers=[1])
    assert student.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in student.state_dict().items())
    assert main([*line[:-1], str(tmp_path / "bad"), "--layers", "1", "first"]) == 2
    assert "'first' must stand alone, got 2 values" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
