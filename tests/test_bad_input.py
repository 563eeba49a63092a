"""Bad input: every case is one line on standard error and exit code 2, before any work is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import hf_compress as hc
from hf_compress.cli.main import main


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", *(f"w{i}" for i in range(90))]


def write_tokenizer(folder: Path, words=WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip


def write_model(folder: Path, **options) -> None:
    torch.manual_seed(0)
    config = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
    BertForSequenceClassification(BertConfig(**{**config, **options})).save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and data, good and broken; commands run inside it."""
    root = tmp_path_factory.mktemp("bad")
    write_model(root / "model")
    write_model(root / "three", num_labels=3)
    write_model(root / "named", id2label={0: "up", 1: "down"}, label2id={"up": 0, "down": 1})
    write_model(root / "swapped", id2label={0: "down", 1: "up"}, label2id={"down": 0, "up": 1})
    write_model(root / "nan")
    weights = load_file(root / "nan" / "model.safetensors")
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, root / "nan" / "model.safetensors", metadata={"format": "pt"})
    write_model(root / "cut")
    raw = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    write_model(root / "bigtok")
    write_tokenizer(root / "bigtok", [*WORDS, *(f"x{i}" for i in range(50))])
    write_model(root / "notok")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "notok" / file).unlink()
    for name, record in (
        ("newer", {"version": 99, "steps": []}),
        ("unknown", {"version": 1, "steps": [{"method": "magic"}]}),
        ("broken", {"version": 1, "steps": [{"method": "structured_pruning", "mac_ratio": 7}]}),
        (
            "toofew",
            {
                "version": 1,
                "steps": [{"method": "structured_pruning", "heads_per_layer": [1], "neurons_per_layer": [8]}],
            },
        ),
    ):
        shutil.copytree(root / "model", root / name)
        config = json.loads((root / name / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "hf_compress", **record}
        (root / name / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    AlbertForSequenceClassification(
        AlbertConfig(vocab_size=len(WORDS), **sizes, num_hidden_layers=1, max_position_embeddings=32)
    ).save_pretrained(root / "albert")
    write_tokenizer(root / "albert")

    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90} w{i % 7}\t{i % 2}" for i in range(64)]
    for folder, header, body in (
        ("data", "sentence\tlabel", rows),
        ("nolabel", "sentence\tscore", rows),
        ("notext", "blurb\tlabel", rows),
        ("oneclass", "sentence\tlabel", [row[:-1] + "0" for row in rows]),
        ("gaps", "sentence\tlabel", [row[:-1] + str(3 * (i % 2)) for i, row in enumerate(rows)]),
        ("norows", "sentence\tlabel", []),
    ):
        (root / folder).mkdir()
        for split in ("train", "validation"):
            (root / folder / f"{split}.tsv").write_text("\n".join([header, *body]) + "\n")
    (root / "notrain").mkdir()
    shutil.copy(root / "data" / "validation.tsv", root / "notrain")
    (root / "nofiles").mkdir()
    (root / "empty.tsv").write_text("")
    (root / "rubbish.parquet").write_bytes(b"PAR1 this is not parquet")
    (root / "table.xlsx").write_text("x")
    (root / "broken.yaml").write_text("learning_rate: [1, 2\n")
    (root / "list.yaml").write_text("- 1\n")
    (root / "typo.yaml").write_text("mac_ration: 0.5\n")
    (root / "strangers").mkdir()
    (root / "strangers" / "thesis.txt").write_text("mine")
    (root / "file").write_text("a file, not a folder")
    return root


FINETUNE = "finetune --model_name_or_path model --data_dir data --output_dir out --max_length 16 --use_cpu"
PRUNE = (
    "prune-structure --model_name_or_path model --data_dir data --output_dir out --max_length 16 "
    "--calibration_samples 64"
)
ZEROS = "prune-weights --model_name_or_path model --data_dir data --output_dir out --max_length 16 --use_cpu"
DISTILL = (
    "distill --model_name_or_path model --teacher_name_or_path named --data_dir data --output_dir out --max_length 16 "
    "--use_cpu"
)
SWAPPED = DISTILL.replace("path model", "path named").replace(
    "teacher_name_or_path named", "teacher_name_or_path swapped"
)

CASES = [
    ("", "usage"),
    ("compact", "command must be one of"),
    (f"{ZEROS} --pattern 2:4", "target_sparsity must be at most 0.5 with pattern='2:4', got 0.9"),
    (f"{ZEROS} --pattern 4to1", "pattern must be 'N:M', 'NxM'"),
    (f"{ZEROS} --op_names nothing", "must select a layer of Linear"),
    (f"{ZEROS} --op_names (", "op_names must be regular expressions"),
    (f"{ZEROS} --local_configs {{", "local_configs"),
    (f"{ZEROS} --local_configs 3", "local_configs must be"),
    (f"{ZEROS} --target_sparcity 0.5", "Did you mean 'target_sparsity'"),
    (f"{ZEROS} --end_step 5000 --max_steps 10", "must leave room for the schedule"),
    (f"{ZEROS} --teacher_name_or_path nowhere", "No classifier can be opened at 'nowhere'"),
    (f"{PRUNE} --mac_ratio 0", r"mac_ratio must be in \(0, 1\], got 0"),
    (f"{PRUNE} --mac_ratio 1.5", "mac_ratio must be in"),
    (f"{PRUNE} --mac_ratio half", "mac_ratio"),
    (f"{PRUNE} --mac_ration 0.5", "Did you mean 'mac_ratio'"),
    (f"{PRUNE} --selection best", "selection"),
    (f"{PRUNE} --order sideways", "order"),
    (f"{PRUNE} --min_heads -1", "min_heads must be at least 0"),
    (f"{PRUNE} --min_heads 9", "min_heads and min_neurons must be at most"),
    (f"{PRUNE} --round_to 0", "round_to must be at least 1"),
    (f"{PRUNE} --ridge -1", "ridge must not be negative"),
    (f"{PRUNE} --seq_len 0", "seq_len must be positive"),
    (f"{PRUNE} --mac_ratio 0.05", "mac_ratio must be at least"),
    (f"{PRUNE} --prune_heads false --mac_ratio 0.3", "mac_ratio must be at least"),
    (f"{PRUNE} --prune_heads false --prune_neurons false", "prune_heads or prune_neurons"),
    (f"{PRUNE} --calibration_samples 0", "calibration_samples must be in 1..N"),
    (f"{PRUNE} --calibration_samples 1000", "calibration_samples must be in 1..64"),
    (f"{PRUNE} --calibration_samples 4", "data must hold at least 64 tokens"),
    (f"{PRUNE} --selection fisher --order sequential", "selection='fisher'"),
    (PRUNE.replace("path model", "path albert"), "model_type must be one of"),
    (PRUNE.replace("path model", "path nan"), "NaN or infinity in classifier.weight"),
    (PRUNE.replace("path model", "path newer"), "version 99"),
    (PRUNE.replace("path model", "path unknown"), "method must be one of"),
    (PRUNE.replace("path model", "path broken"), "mac_ratio must be in"),
    (PRUNE.replace("path model", "path toofew"), "must have 2 entries"),
    (PRUNE.replace("path model", "path cut"), "No classifier can be opened"),
    (PRUNE.replace("path model", "path nowhere"), "nowhere"),
    (PRUNE.replace("path model", "path notok"), "tokenizer"),
    (PRUNE.replace("path model", "path bigtok"), "belongs to another model"),
    (PRUNE.replace("output_dir out", "output_dir file"), "output_dir|exists|file"),
    (FINETUNE.replace("data_dir data", "data_dir nolabel"), "missing: label"),
    (FINETUNE.replace("data_dir data", "data_dir notext"), "blurb, label: name the one with the texts by"),
    (FINETUNE.replace("data_dir data", "data_dir oneclass"), "at least two classes"),
    (FINETUNE.replace("data_dir data", "data_dir gaps"), "class ids 0..C-1"),
    (FINETUNE.replace("data_dir data", "data_dir norows"), "norows|at least one row|empty|cannot be read"),
    (FINETUNE.replace("data_dir data", "data_dir notrain"), "split must be one of"),
    (FINETUNE.replace("data_dir data", "data_dir nofiles"), "found none"),
    (FINETUNE.replace("data_dir data", "data_dir nowhere"), "data_dir must be a folder"),
    (FINETUNE.replace("data_dir data", "train_file empty.tsv"), "must not be empty"),
    (FINETUNE.replace("data_dir data", "train_file rubbish.parquet"), "cannot be read"),
    (FINETUNE.replace("data_dir data", "train_file table.xlsx"), "must end in one of"),
    (FINETUNE.replace("data_dir data", "train_file nowhere.csv"), "must exist"),
    (FINETUNE.replace("--data_dir data", "--task_name sst3"), "task_name must be one of"),
    (FINETUNE.replace("--data_dir data", ""), "task_name, data_dir or train_file"),
    (FINETUNE.replace("length 16", "length 999"), "max_length must be at most 32"),
    (FINETUNE.replace("length 16", "length 1"), "max_length must be at least 2"),
    (FINETUNE.replace("path model", "path three"), "3 labels, the task 'data' has 2"),
    (FINETUNE.replace("path model", "path nan"), "NaN or infinity"),
    (f"{FINETUNE} --resume_from_checkpoint nowhere", "resume_from_checkpoint"),
    (f"{FINETUNE} --learning_rate fast", "learning_rate"),
    (f"{FINETUNE} --config nowhere.yaml", "config must be a readable YAML file"),
    (f"{FINETUNE} --config broken.yaml", "not valid YAML"),
    (f"{FINETUNE} --config list.yaml", "'name: value' lines"),
    (f"{PRUNE} --config typo.yaml", "Did you mean 'mac_ratio'"),
    (f"{DISTILL} --temperature 0", "temperature must be positive"),
    (f"{DISTILL} --alpha_task -1", "alpha_task must be zero or positive"),
    (f"{DISTILL} --alpha_layer 1 --layer_map 0 9", "layer_map must hold teacher layers 0..1"),
    (f"{DISTILL} --teacher_cache_dir strangers", "empty or a teacher cache"),
    (f"{DISTILL} --teacher_cache_dir file", "teacher_cache_dir"),
    (DISTILL.replace("teacher_name_or_path named", "teacher_name_or_path three"), "3 labels"),
    (SWAPPED.replace("distill", "joint-distill", 1), "must count its labels as the student does"),
    (DISTILL.replace("--teacher_name_or_path named", ""), "teacher_name_or_path"),
    (DISTILL.replace("teacher_name_or_path named", "teacher_name_or_path nowhere"), "nowhere"),
    ("evaluate --models model --data_dir data --max_length 16 --split test", "split must be one of"),
    ("evaluate --models nowhere --data_dir data --max_length 16", "nowhere"),
    ("evaluate --models model --data_dir data --max_length 16 --eval_batch_size 0", "eval_batch_size must be"),
    ("report --models model nan --data_dir data --max_length 16 --output_dir out", "NaN or infinity"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("line", "expected"), CASES, ids=[f"{i:02d}" for i in range(len(CASES))])
def test_one_line_and_exit_code_2(place, monkeypatch, capsys, line, expected):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    if expected == "usage":
        assert captured.out.startswith("usage")
        return
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("hf-compress: ")
    assert "Traceback" not in captured.err
    assert re.search(expected, last), last
    assert not (place / "out" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["model", "checkpoint"])
def test_full_disk(place, tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(place)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = "transformers.PreTrainedModel.save_pretrained" if where == "model" else "torch.save"
    monkeypatch.setattr(target, full)
    save = "no" if where == "model" else "epoch"
    line = f"{FINETUNE} --num_train_epochs 1 --save_strategy {save}".replace(
        "output_dir out", f"output_dir {tmp_path}/full"
    )
    assert main(line.split()) == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(Path(tmp_path).rglob("*.safetensors")) or where == "checkpoint"
    assert not list(Path(tmp_path, "full").glob("checkpoint-*"))


@pytest.mark.parametrize("selection", ["interpolative", "fisher"])
def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(place, monkeypatch, capsys, selection):
    def nothing(*args, **kwargs):
        raise AssertionError("measured a model whose shapes forbid the budget")

    monkeypatch.chdir(place)
    monkeypatch.setattr("hf_compress.stages.prune_structure.compress", nothing)
    assert main(f"{PRUNE} --mac_ratio 0.01 --selection {selection}".split()) == 2
    assert "mac_ratio must be at least" in capsys.readouterr().err


def test_data_without_labels_for_fisher():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    ))  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [{"input_ids": torch.randint(5, 99, (4, 16))}] * 4
    with pytest.raises(ValueError, match="labels"):
        hc.compress(model, hc.StructuredPruningConfig(selection="fisher"), data=batches)
    with pytest.raises(ValueError, match="data must be given"):
        hc.compress(model, hc.StructuredPruningConfig())
    with pytest.raises(ValueError, match="at least one batch"):
        hc.compress(model, hc.StructuredPruningConfig(), data=[])
    with pytest.raises(ValueError, match="input_ids"):
        hc.compress(model, hc.StructuredPruningConfig(), data=[{"text": "x"}])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_success_is_exit_code_0(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    assert main(["--help"]) == 0
    assert main(f"{PRUNE.replace('dir out', f'dir {tmp_path}/p')} --mac_ratio 0.7".split()) == 0
    assert "of the arithmetic kept" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "p" / "results.json")
