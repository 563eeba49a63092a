"""`hf-compress export`, and the folder in a process that does not have this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.cli.main import main
from tests.conftest import ARCHITECTURES
from tests.contract.conftest import REFUSED
from tests.export_support import BEGIN, END, METHODS, tiny, verdict
from tests.labelled_models import write_rows


for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
# Modules of this package cannot be imported in this process.
ALONE = "import sys\nsys.modules['hf_compress'] = None\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_export_command(tmp_path, monkeypatch, capsys, model, tokenizer, sentences):
    monkeypatch.chdir(tmp_path)
    pruned = hc.compress(
        model("distilbert", "sequence_classification"),
        hc.StructuredPruningConfig(mac_ratio=0.6),
        data=[dict(tokenizer([text for text, _ in sentences], padding=True, return_tensors="pt"))],
    )
    pruned.config.id2label, pruned.config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
    pruned.save_pretrained("small")
    tokenizer.save_pretrained("small")
    write_rows(tmp_path / "data" / "validation.jsonl", [{"sentence": text, "label": y} for text, y in sentences])
    # An older export in the same folder is replaced.
    Path("out").mkdir()
    Path("out/model_int8.onnx").write_text("old")
    line = "export --model_name_or_path small --data_dir data --output_dir out --latency_repeats 2 --max_length 32"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert not Path("out/model_int8.onnx").exists()
    results = json.loads(Path("out/results.json").read_text())
    assert results["export"] == json.loads(Path("out/export.json").read_text())
    assert results["metrics"]["PyTorch"] == results["metrics"]["ONNX Runtime"]
    assert [timed["batch_size"] for timed in results["latency"]] == [1, 8]
    assert {entry["name"] for timed in results["latency"] for entry in timed["latencies"]} == {
        "PyTorch",
        "ONNX Runtime",
    }
    assert " of PyTorch on " in said
    assert "saved to out" in said

    # The program of the page, without this package.
    program = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Exported" in block
    )
    Path("program.py").write_text(ALONE + program.replace("small_onnx", "out"))
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, check=True)
    found = done.stdout
    assert "is not supported" not in done.stderr
    ours = transformers.pipeline("text-classification", model=pruned, tokenizer=tokenizer)(["a good film"])
    assert f"'label': '{ours[0]['label']}'" in found
    assert float(re.search(r"'score': ([0-9.]+)", found)[1]) == pytest.approx(ours[0]["score"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sentence_vectors(tmp_path, monkeypatch, model, tokenizer, sentences):
    """The page's own program gives the vectors of the original."""
    monkeypatch.chdir(tmp_path)
    encoder, texts = model("bert", "base"), [text for text, _ in sentences[:5]]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    hc.export_onnx(encoder, "encoder_onnx", [batch], tokenizer)
    program = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "encode(" in block
    )
    names = {}
    exec(compile(program, "export.md", "exec"), names)
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
    means = torch.stack([row[mask.bool()].mean(0) for row, mask in zip(states, batch["attention_mask"], strict=True)])
    expected = means / means.norm(dim=-1, keepdim=True)
    assert (names["encode"](texts) - expected).abs().max() < 1e-5


def test_the_page_has_every_cell():
    """Whoever adds an architecture or a method prints the table again (`python -m tests.export_support`)."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[1:] == [method.replace("_", " ") for method in METHODS]
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    for architecture, *cells in rows:
        for method, cell in zip(METHODS, cells, strict=True):
            assert (cell == "") == ((method, architecture) in REFUSED), (architecture, method)
            if cell:
                difference, int8 = cell.split(", int8 ")
                assert float(difference) < 1e-4
                assert float(int8.split(",")[0]) <= 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "method"), [("gpt2", "dense"), ("modernbert", "linformer"), ("distilbert", "token_pruning")]
)
def test_support(architecture, method):
    """Cells of the table of `python -m tests.export_support`: a decoder, windows, all tokens after dropping some."""
    found = verdict(architecture, method, tiny(architecture), int8=False)
    print(architecture, method, found)
    assert float(found) < 1e-4
