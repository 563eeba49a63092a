"""Folders for ONNX Runtime: they compute what PyTorch computes, or are not written."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.core.forward_state import FORWARD_STATE, forward_state
from hf_compress.core.saving import complete_or_absent
from tests.conftest import ARCHITECTURES, HEADS
from tests.rounding import assert_equal_to_rounding


for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

TEXTS = ["good film", "the plot was very bad and the cast was quite good", "a bad story", "the scene was good"]


def read(tokenizer, texts):
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def small_classifier(tokenizer, sentences):
    """A classifier of two layers that lost heads and neurons and drops tokens in the first one."""
    config = ARCHITECTURES["distilbert"](label2id={"no": 0, "yes": 1}, id2label={0: "no", 1: "yes"})
    torch.manual_seed(0)
    return hc.compress(
        HEADS["sequence_classification"].from_config(config).eval(),
        hc.StructuredPruningConfig(mac_ratio=0.6),
        hc.TokenPruningConfig(final_token_threshold=0.2, threshold_ramp="one_based", score_norm="live"),
        data=[read(tokenizer, [text for text, _ in sentences])],
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer, sentences):
    """That classifier and its folder with both graphs; few tests use it, because each test worker exports again."""
    model, folder = small_classifier(tokenizer, sentences), tmp_path_factory.mktemp("onnx") / "model"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labelled = [{**read(tokenizer, TEXTS), "labels": torch.tensor([1, 0, 0, 1])}]
    report = hc.export_onnx(model, folder, labelled, tokenizer, int8=True, int8_bound=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return model, folder, report


def test_onnx_runtime_gives_the_outputs_of_pytorch(exported, tokenizer):
    """On texts that the export has not seen, of other lengths and in batches of other sizes."""
    model, folder, _ = exported
    runtime = hc.OnnxModel.from_pretrained(folder)
    small = hc.OnnxModel.from_pretrained(folder, int8=True)
    texts = ["story", "a very very long story and a plot and a cast " * 3, "the the", "bad bad bad film", "quite"]
    for part in (texts, texts[:1], texts[1:3]):
        batch = read(tokenizer, part)
        with torch.no_grad():
            state = forward_state(model)
            expected = model(**batch, **state).logits
        # The last layer computes first tokens only; the one before it has dropped some.
        assert len(part) == 1 or state[FORWARD_STATE].kept_after(0).sum() < batch["attention_mask"].sum()
        assert_equal_to_rounding(runtime(**batch).logits, expected)
        assert 0 < (small(**batch).logits - expected).abs().max() < expected.std() + 0.5

    ids = read(tokenizer, texts[:1])["input_ids"]
    with torch.no_grad():
        # A mask of ones is what the original assumes, too.
        assert_equal_to_rounding(runtime(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="must have the inputs input_ids, .*; input_ids is missing"):
        runtime(attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="return_dict must be true"):
        runtime(input_ids=ids, return_dict=False)

    # In a pipeline.
    answers = [
        transformers.pipeline("text-classification", model=each, tokenizer=tokenizer)(texts)
        for each in (model, runtime)
    ]
    assert [[entry["label"] for entry in found] for found in answers] == [[e["label"] for e in answers[0]]] * 2
    assert [e["score"] for e in answers[1]] == pytest.approx([e["score"] for e in answers[0]], abs=1e-5)


def test_the_folder_says_what_was_checked(exported):
    model, folder, report = exported
    files = {file.name for file in folder.iterdir()}
    assert {"model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "export.json"} <= files
    assert not [name for name in files if "safetensors" in name or "incomplete" in name]
    assert json.loads((folder / "export.json").read_text()) == report
    assert [step["method"] for step in report["steps"]] == ["structured_pruning", "token_pruning"]
    sizes = [tuple(check["size"]) for check in report["checks"]]
    assert len({batch for batch, _ in sizes}) >= 3
    assert len({tokens for _, tokens in sizes}) >= 2
    assert report["largest_difference"] == max(check["difference"] for check in report["checks"]) < 1e-5
    assert report["outputs"] == ["logits"]
    assert report["int8"]["moved"] <= 0.5
    assert report["bytes"]["model.onnx"] == (folder / "model.onnx").stat().st_size


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no model.onnx: export the model first"):
        hc.OnnxModel.from_pretrained(tmp_path)
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(ValueError, match="ONNX Runtime cannot open"):
        hc.OnnxModel(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"has no model_int8.onnx: export the model with int8 first"):
        hc.OnnxModel.from_pretrained(tmp_path, int8=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": []}, "data must hold at least one batch"),
        ({"data": {"input_ids": torch.ones(1, 2)}}, "data must be batches"),
        ({"data": [{"text": "a film"}]}, r"data must hold dicts with a tensor input_ids .* got \['text'\]"),
        ({"int8_bound": 0.0}, "int8_bound must be positive, got 0.0"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_refused_before_work(model, tokenizer, tmp_path, change, words):
    arguments = {"output_dir": tmp_path / "new", "data": [read(tokenizer, TEXTS)]}
    with pytest.raises(ValueError, match=words):
        hc.export_onnx(model("bert", "sequence_classification"), **{**arguments, **change})
    assert not (tmp_path / "new").exists()


def test_only_single_precision(model, tokenizer, tmp_path):
    half = model("bert", "sequence_classification").half()
    with pytest.raises(ValueError, match=r"single precision, got torch.float16: call model.float\(\) first"):
        hc.export_onnx(half, tmp_path / "new", [read(tokenizer, TEXTS)])
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        hc.export_onnx(torch.nn.Linear(2, 2), tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_files_are_half_moved_has_no_graph(tmp_path, monkeypatch):
    """The old graphs go first and the new ones come last."""
    for name in ("model.onnx", "model_int8.onnx", "config.json"):
        (tmp_path / name).write_text("old")
    moved = []

    def stop(source, target):
        moved.append(Path(target).name)
        raise KeyboardInterrupt

    def interrupted():
        with complete_or_absent(tmp_path) as staged:
            for name in ("config.json", "export.json", "model.onnx"):
                (staged / name).write_text("new")
            monkeypatch.setattr(os, "replace", stop)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert moved == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_idle_threads_of_the_runtime_leave_the_cores(exported):
    options = hc.OnnxModel.from_pretrained(exported[1]).session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_sums_and_normalisations_stay_apart(exported, monkeypatch):
    """The runtime's joint operator takes several times as long as the two."""
    import onnxruntime

    given = {}

    def session(*args, **more):
        given.update(more)
        raise RuntimeError("not opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(ValueError, match="not opened"):
        hc.OnnxModel.from_pretrained(exported[1])
    assert given["disabled_optimizers"] == ["SkipLayerNormFusion"]


def test_a_graph_that_computes_something_else_is_not_written(model, tokenizer, tmp_path):
    """A model whose outputs depend on how often it was called: the graph holds the number of one call."""
    counting = model("distilbert", "sequence_classification")
    calls = []

    def add_calls(module, inputs, output):
        calls.append(1)
        return output + len(calls)

    counting.classifier.register_forward_hook(add_calls)
    with pytest.raises(ValueError, match=r"The exported logits differs by .* from PyTorch's on a batch of size \[1, "):
        hc.export_onnx(counting, tmp_path / "new", [read(tokenizer, TEXTS)])
    assert list((tmp_path / "new").iterdir()) == []
