"""A compressed sentence encoder opens with sentence-transformers; runs where that package is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from scipy import stats

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.report.quality import evaluated
from hf_compress.stages.measured import measured
from hf_compress.tasks.sources import DataArguments, load_task
from tests.labelled_models import write_rows
from tests.test_task_kinds import write_modules


sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pairs(tmp_path, sentences):
    texts = [t for t, _ in sentences]
    rows = [
        {"sentence1": a, "sentence2": b, "label": len(set(a.split()) & set(b.split())) / 2}
        for a, b in zip(texts[:32], texts[32:], strict=True)
    ]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    return rows


@pytest.mark.parametrize("pooling", [None, "mean", "cls", "max"])
def test_the_same_vectors_and_spearman(tmp_path, monkeypatch, pairs, model, tokenizer, pooling):
    monkeypatch.chdir(tmp_path)
    model("bert").save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    if pooling is not None:
        write_modules(tmp_path / "encoder", pooling)
    prune = "prune-structure --model_name_or_path encoder --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    data = "--data_dir data --max_length 32 --task_kind sentence-embedding --device cpu"
    assert main(f"{prune} {data}".split()) == 0
    opened = sentence_transformers.SentenceTransformer("cut", device="cpu")
    first, second = (opened.encode([row[name] for row in pairs]) for name in ("sentence1", "sentence2"))
    cosines = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    task = load_task(DataArguments(data_dir="data", max_length=32, task_kind="sentence-embedding"))
    answers = evaluated(measured("cut", task, "validation", 32))
    np.testing.assert_allclose(cosines, answers.cosines, rtol=1e-4, atol=1e-5)
    expected = stats.spearmanr(cosines, [row["label"] for row in pairs]).statistic
    assert answers.metrics()["spearman"] == pytest.approx(expected, abs=1e-3)


def test_one_import_opens_it_in_another_process(tmp_path, monkeypatch, pairs, model, tokenizer):
    monkeypatch.chdir(tmp_path)
    model("bert").save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    prune = "prune-structure --model_name_or_path encoder --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    assert main(f"{prune} --data_dir data --max_length 32 --task_kind sentence-embedding --device cpu".split()) == 0
    program = (
        "import hf_compress; from sentence_transformers import SentenceTransformer; "
        "m = SentenceTransformer('cut', device='cpu'); print(*m.encode('the good film').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = np.array([float(number) for number in done.stdout.split()])
    net = transformers.AutoModel.from_pretrained("cut")
    states = net(**tokenizer("the good film", return_tensors="pt")).last_hidden_state[0].mean(0).detach().numpy()
    # A plain encoder's vectors are the mean over tokens, of length 1.
    np.testing.assert_allclose(found, states / np.linalg.norm(states), atol=1e-5)


@pytest.mark.slow
def test_an_exported_encoder_takes_the_place_of_the_original(tmp_path, monkeypatch, pairs, model, tokenizer):
    """Vectors, pooling and Spearman of a pruned encoder in ONNX Runtime; the exported folder says how it pools."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    model("bert").save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    write_modules(tmp_path / "encoder", "cls")
    data = "--data_dir data --max_length 32 --task_kind sentence-embedding"
    prune = "prune-structure --model_name_or_path encoder --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    assert main(f"{prune} {data} --device cpu".split()) == 0
    times = "--int8 --int8_bound 0.5 --latency_repeats 1 --latency_batch_sizes 2 --latency_examples 2"
    assert main(f"export --model_name_or_path cut --output_dir cut_onnx {data} {times}".split()) == 0
    opened, texts = sentence_transformers.SentenceTransformer("cut", device="cpu"), [row["sentence1"] for row in pairs]
    expected = opened.encode(texts)
    opened[0].model = hc.OnnxModel.from_pretrained("cut_onnx", int8=True)
    assert 0 < np.abs(opened.encode(texts) - expected).max() < np.abs(expected).max()
    opened[0].model = hc.OnnxModel.from_pretrained("cut_onnx")
    first, second = (opened.encode([row[name] for row in pairs]) for name in ("sentence1", "sentence2"))
    assert np.abs(first - expected).max() < 1e-5
    # By the package's own command, which finds the pooling in the exported folder.
    names = ["cut", "cut_onnx"]
    assert main(f"evaluate --models {' '.join(names)} {data} --output_file found.json".split()) == 0
    cut, exported = (json.loads(Path("found.json").read_text())[name]["spearman"] for name in names)
    assert exported == pytest.approx(cut, abs=2e-3)
    cosines = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    assert exported == pytest.approx(stats.spearmanr(cosines, [row["label"] for row in pairs])[0], abs=2e-3)
