"""Every program and every command of the documentation runs as it stands, on tiny models and few rows.

What a page supposes is there: names on the Hub are folders here (and where a page names a task of the Hub, files take
its place), `...` among the arguments of a trainer is the model, its arguments and rows, and trainings are short.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.cli.main import main
from tests.pages import PAGES, blocks, commands


pytestmark = pytest.mark.filterwarnings("ignore")

# Part of a block -> the test that runs it.
ELSEWHERE = {
    "load_dataset": "tests/test_readme.py",
    "class Exported": "tests/test_export_command.py",
    "def encode(": "tests/test_export_command.py",
    "join_trainers": "tests/test_trainers_page.py",
    "get_peft_model": "tests/test_trainers_page.py",
    "hyperparameter_search": "tests/test_trainers_page.py",
    "output_dir: runs/shrink": "tests/test_recipes.py",
    "target: {dense": "tests/test_recipes.py",
    "stage: search": "tests/test_recipes.py",
    "trainer.push_to_hub": "tests/test_hub.py",
}
# Commands that need more than this machine -> why, or the tests that run them.
NOT_RUN = {
    "hf-compress demo": "tests/test_demo.py, make demo",
    "hf-compress run": "tests/test_recipes.py",
    "--dry_run false": "needs the network",
}
# It comes with an extra of its own.
SENTENCE_TRANSFORMERS = find_spec("sentence_transformers") is not None
# What a page supposes that commands have made, besides the folders of `prepared`.
BEFORE = {
    "docs/export.md": "hf-compress export --model_name_or_path dense --data_dir reviews --output_dir dense_onnx --int8"
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *(f"w{i}" for i in range(40))]
CLASSES = ["business", "sports"]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 130}
SHORT = {
    "finetune": "--max_steps 2", "distill": "--max_steps 2", "proximal": "--max_steps 2",
    "prune-weights": "--pruning_frequency 1", "report": "--latency_repeats 1 --latency_examples 8",
    "export": "--latency_repeats 1 --latency_examples 8 --check_examples 8", "push": "--dry_run",
    "prune-structure": "--calibration_samples 64", "prune-tokens": "--max_steps 2",
}  # fmt: skip


def sentences(rows=64):
    return [(f"{'good' if i % 2 else 'bad'} w{i % 40} w{i % 7} w{i % 11} w{i % 13}", i % 2) for i in range(rows)]


def write_model(folder, kind=transformers.BertForSequenceClassification, layers=2, **more):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), num_hidden_layers=layers, **SMALL, **more)
    kind(config).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=128)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_decoder(folder, tokenizer):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=130, pad_token_id=0,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(root):
    texts, labels = zip(*sentences(), strict=True)
    classes = [CLASSES[label] for label in labels]
    halves = {"sentence1": texts, "sentence2": texts[::-1], "label": [float(label) for label in labels]}
    tables = {
        "reviews": {"sentence": texts, "label": labels}, "my_data": {"text": texts, "label": labels}, "stsb": halves,
        "pairs": halves | {"label": labels}, "questions": {"question": texts, "context": texts[::-1]},
        "stories": {"text": texts},
        "candidates": {"query": [texts[i - i % 4] for i in range(64)], "passage": texts, "label": [0, 1, 0, 1] * 16},
    }  # fmt: skip
    for folder, columns in tables.items():
        for split in ("train", "validation", "test"):
            datasets.Dataset.from_dict(columns).to_csv(root / folder / f"{split}.csv")
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=CLASSES)})
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=names)
        rows.to_parquet(root / "demo_output" / "bbc_news" / f"{split}.parquet")
    datasets.Dataset.from_dict({"text": texts}).to_parquet(root / "train.parquet")
    (root / "more.txt").write_text("good w1\n")
    return classes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with everything that pages name."""
    root = tmp_path_factory.mktemp("pages")
    write_data(root)
    write_model(root / "dense")
    write_model(root / "ENCODER", transformers.BertModel)
    write_model(root / "all-MiniLM-L6-v2", transformers.BertModel)
    write_model(root / "bert-base-uncased", transformers.BertModel, layers=7)
    write_model(root / "dslim" / "bert-base-NER", transformers.BertForTokenClassification)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "dense")
    write_decoder(root / "opt", tokenizer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "dense")
    batches = [dict(tokenizer([text for text, _ in sentences()], padding=True, return_tensors="pt"))]
    hc.compress(model, hc.StructuredPruningConfig(mac_ratio=0.6), data=batches)
    sparse = transformers.AutoModelForSequenceClassification.from_pretrained(root / "dense")
    hc.compress(sparse, hc.WeightPruningConfig(criterion="magnitude", pattern="1x1", target_sparsity=0.95))
    for name in ("small", "pruned", "recovered", "me/small", "sparse"):
        (sparse if name == "sparse" else model).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def names_for_programs(root, block):
    """What the program of a block takes for granted."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "dense")
    texts, labels = zip(*sentences(), strict=True)
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    batch = dict(encoded)
    rows = datasets.Dataset.from_dict({**{k: v.tolist() for k, v in encoded.items()}, "labels": list(labels)})
    deep = "bert-base-uncased" if "num_layers=6" in block.text else "dense"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / deep)
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(root / "bert-base-uncased")
    arguments = transformers.TrainingArguments("trained", max_steps=60, use_cpu=True, save_strategy="no")
    public = {name: getattr(transformers, name) for name in (
        "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "Trainer", "pipeline")}  # fmt: skip
    return public | {
        "hc": hc, "torch": torch, "model": model, "teacher": teacher, "tokenizer": tokenizer, "texts": list(texts),
        "batch": batch, "batches": [batch], "labelled": [batch | {"labels": torch.tensor(labels)}], "rows": rows,
        "args": arguments,
    }  # fmt: skip


def completed(program):
    """A program with what `...` stands for among the arguments of a trainer."""
    program = re.sub(r"(Trainer\()\s*\.\.\.,", r"\1model, args, train_dataset=rows,", program)
    return re.sub(r",\s*\.\.\.\)", ", train_dataset=rows)", program)


def shortened(words):
    """A command whose training and timing are short, with files in place of a task of the Hub."""
    line = re.sub(r"--task_name \w+", "--data_dir my_data", " ".join(words[1:]))
    line = re.sub(r"--max_steps \d+", "", line)
    # Models that were hardly trained give nearly the same outputs for all texts: every rounding moves them far.
    line = re.sub(r"--int8\b(?!_)", "--int8 --int8_bound 1000", line)
    if "--num_train_epochs 0" in line or words[1] not in SHORT or SHORT[words[1]] in line:
        return line
    return f"{line} {SHORT[words[1]]}"


def is_elsewhere(block):
    return any(part in block.text for part in ELSEWHERE)


def is_run(words):
    return not any(" ".join(words).startswith(start) for start in NOT_RUN)


RUN = [page for page in PAGES if any(map(is_run, commands(page))) or blocks(page, "python") or blocks(page, "yaml")]


def test_other_tests_exist():
    assert len(RUN) > 12
    assert {file for file in ELSEWHERE.values() if not Path(__file__).parents[1].joinpath(file).is_file()} == set()
    texts = [block.text for page in PAGES for block in blocks(page)]
    assert [part for part in ELSEWHERE if not any(part in text for text in texts)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_programs_and_commands(page, prepared, tmp_path, monkeypatch, capsys):
    place = tmp_path / "place"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    if page in BEFORE:
        assert main(shortened(BEFORE[page].split()).split()) == 0
    for block in blocks(page):
        if is_elsewhere(block) or ("sentence_transformers" in block.text and not SENTENCE_TRANSFORMERS):
            continue
        if block.language == "python":
            exec(compile(completed(block.text), block.name, "exec"), names_for_programs(place, block))
        elif block.language == "yaml":
            # Where a page says nothing else, its options are those of the command that stands before them.
            Path("data.yaml").write_text(block.text)
            if "local_configs" in block.text:
                line = (
                    "prune-weights --model_name_or_path dense --data_dir my_data --config data.yaml --output_dir mixed"
                )
                assert main([*line.split(), "--num_train_epochs", "4", "--pruning_frequency", "1"]) == 0, (
                    capsys.readouterr()
                )
        else:
            for words in filter(is_run, commands(block)):
                assert main(shortened(words).split()) == 0, f"{block.name}: {capsys.readouterr()}"
