"""Every kind of task through the command line: what training measures is what `evaluate` measures afterwards."""

import io
import json

import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image

from hf_compress.cli.main import main
from hf_compress.stages.saved import save_stage
from tests.images_and_sounds import opens_images
from tests.labelled_models import write_rows
from tests.test_task_kinds import write_modules


pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = "--learning_rate 2e-3 --per_device_train_batch_size 16 --report_to none --device cpu"


@pytest.fixture
def place(tmp_path, monkeypatch, model, tokenizer):
    """A folder with encoders and a causal language model, to be filled with data."""
    monkeypatch.chdir(tmp_path)
    for name, architecture, head in (("encoder", "bert", "base"), ("writer", "llama", "causal_lm")):
        model(architecture, head).save_pretrained(name)
        tokenizer.save_pretrained(name)
    return tmp_path


def write_splits(folder, rows):
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def measured(models, options, place):
    assert main(f"evaluate --models {models} --output_file out.json --device cpu {options}".split()) == 0
    return json.loads((place / "out.json").read_text())


def same_as_evaluate(place, folder, options, metrics):
    """Whether what the stage wrote is what `evaluate` finds in the saved model."""
    found = measured(folder, options, place)[folder]
    written = results(place / folder)
    for name in metrics:
        assert written[f"eval_{name}"] == pytest.approx(found[name], rel=1e-4), name
    return found


def test_tags_are_learned(place, sentences):
    tags = {"good": "B-PER", "film": "B-LOC", "plot": "I-LOC"}
    write_splits(
        place / "data",
        [{"tokens": t.split(), "tags": [tags.get(word, "O") for word in t.split()]} for t, _ in sentences],
    )
    data = "--data_dir data --max_length 32"
    command = f"finetune --model_name_or_path encoder --output_dir out {data} {QUICK} --num_train_epochs 15"
    assert main(command.split()) == 0
    found = same_as_evaluate(place, "out", data, ["f1", "accuracy", "precision", "recall"])
    assert found["f1"] > 0.9
    opened = transformers.AutoModelForTokenClassification.from_pretrained("out")
    assert sorted(opened.config.label2id) == ["B-LOC", "B-PER", "I-LOC", "O"]


def test_several_labels_are_learned(place, sentences):
    rows = [{"text": t, "label": [w for w in ("film", "plot", "good") if w in t.split()]} for t, _ in sentences]
    write_splits(place / "data", rows)
    data = "--data_dir data --max_length 32"
    command = f"finetune --model_name_or_path encoder --output_dir out {data} {QUICK} --num_train_epochs 15"
    assert main(command.split()) == 0
    assert same_as_evaluate(place, "out", data, ["f1", "f1_macro", "accuracy"])["f1"] > 0.9
    distil = "distill --model_name_or_path encoder --teacher_name_or_path out --output_dir student"
    assert main(f"{distil} {data} {QUICK} --max_steps 4".split()) == 0
    assert results(place / "student").keys() >= {"eval_f1", "eval_loss"}


@pytest.fixture
def questions(place, sentences):
    rows = []
    for number in range(24):
        text = " ".join(t for t, _ in sentences[number : number + 4])
        words = text.split()
        start = len(" ".join(words[:number])) + (number > 0)
        rows.append(
            {
                "context": text,
                "question": "the good film",
                "answers": {"text": [words[number]], "answer_start": [start]},
            }
        )
    write_splits(place / "data", rows)
    return "--data_dir data --max_length 32"


def test_questions_are_judged_in_training(place, questions):
    best = "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true --metric_for_best_model f1"
    command = f"finetune --model_name_or_path encoder --output_dir out {questions} {QUICK} --num_train_epochs 2 {best}"
    assert main(command.split()) == 0
    same_as_evaluate(place, "out", questions, ["f1", "exact_match"])
    state = json.loads(next(place.glob("out/checkpoint-*/trainer_state.json")).read_text())
    assert "eval_f1" in state["log_history"][-1] or any("eval_f1" in entry for entry in state["log_history"])
    assert state["best_metric"] == max(e["eval_f1"] for e in state["log_history"] if "eval_f1" in e)


def test_a_metric_that_questions_do_not_have_is_refused(place, questions, capsys):
    best = "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true --metric_for_best_model bleu"
    command = f"finetune --model_name_or_path encoder --output_dir out {questions} {QUICK} --num_train_epochs 1 {best}"
    assert main(command.split()) != 0
    assert "bleu" in capsys.readouterr().err


def test_text_is_modelled_pruned_and_compared(place, sentences):
    write_splits(place / "data", [{"text": t} for t, _ in sentences])
    data = "--data_dir data --max_length 32"
    before = measured("writer", data, place)["writer"]["perplexity"]
    command = f"finetune --model_name_or_path writer --output_dir out {data} {QUICK} --num_train_epochs 12"
    assert main(command.split()) == 0
    assert same_as_evaluate(place, "out", data, ["perplexity"])["perplexity"] < before / 2
    prune = "prune-structure --model_name_or_path out --output_dir cut --mac_ratio 0.7 --calibration_samples 8"
    assert main(f"{prune} {data} --device cpu".split()) == 0
    report = f"report --models out cut --output_dir report {data} --latency_repeats 1 --latency_batch_sizes 1"
    assert main(f"{report} --device cpu".split()) == 0
    found = json.loads((place / "report" / "report.json").read_text())
    assert found["metric"] == "perplexity"
    worse = found["models"][1]["metrics"]["perplexity"] > found["models"][0]["metrics"]["perplexity"]
    assert worse
    assert "LOST" not in found["models"][1]["verdicts"][0]


@opens_images
def test_images_are_learned_pruned_and_compared(place):
    rows = []
    for number in range(32):
        file = io.BytesIO()
        shade = 120 * (number % 2) + 3 * number
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": ("dark", "light")[number % 2]})
    (place / "data").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(place / "data" / f"{split}.parquet")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained("vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("vit")
    assert (
        main(
            f"finetune --model_name_or_path vit --output_dir out --data_dir data {QUICK} --num_train_epochs 15".split()
        )
        == 0
    )
    assert same_as_evaluate(place, "out", "--data_dir data", ["accuracy"])["accuracy"] > 0.9
    prune = "prune-structure --model_name_or_path out --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    assert main(f"{prune} --data_dir data --device cpu".split()) == 0
    # Four patches and the class token, in two layers of 5 * (4 * 16 * 16 + 2 * 16 * 16) + 2 * 5 * 5 * 16.
    done = results(place / "cut")
    assert done["step"]["seq_len"] == 5
    assert done["before"]["macs"] == 2 * (5 * 6 * 16 * 16 + 2 * 5 * 5 * 16)
    assert done["mac_ratio"] <= 0.5
    cut = transformers.AutoModelForImageClassification.from_pretrained("cut")
    assert sum(p.numel() for p in cut.parameters()) == done["after"]["params"] < done["before"]["params"]
    assert measured("cut", "--data_dir data", place)["cut"]["accuracy"] >= 0.5
    report = "report --models out cut --output_dir report --data_dir data --latency_repeats 1 --latency_batch_sizes 1"
    assert main(f"{report} --device cpu".split()) == 0
    found = json.loads((place / "report" / "report.json").read_text())
    assert found["models"][1]["mac_ratio"] == pytest.approx(done["mac_ratio"])


@pytest.fixture
def pairs(place, sentences):
    texts = [t for t, _ in sentences]
    rows = [
        {"sentence1": a, "sentence2": b, "score": len(set(a.split()) & set(b.split())) / 2}
        for a, b in zip(texts[:32], texts[32:], strict=True)
    ]
    write_rows(place / "data" / "train.jsonl", [{"text": t} for t in texts])
    write_rows(place / "data" / "validation.jsonl", rows)
    return "--data_dir data --max_length 32 --label_column score"


def test_a_sentence_encoder_stays_one(place, pairs):
    write_modules(place / "encoder", "cls")
    (place / "encoder" / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    (place / "encoder" / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    prune = "prune-structure --model_name_or_path encoder --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    assert main(f"{prune} {pairs} --device cpu".split()) == 0
    recover = "distill --model_name_or_path cut --teacher_name_or_path encoder --output_dir recovered"
    losses = "--alpha_task 0 --alpha_similarity 1 --alpha_layer 1"
    assert main(f"{recover} {losses} {pairs} {QUICK} --num_train_epochs 5".split()) == 0
    files = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")
    for folder in ("cut", "recovered"):
        for file in files:
            assert (place / folder / file).read_bytes() == (place / "encoder" / file).read_bytes()
    same_as_evaluate(place, "recovered", pairs, ["spearman", "pearson"])
    # Without a label, the student has come closer to its teacher.
    batch = transformers.AutoTokenizer.from_pretrained("encoder")(["the good film", "a bad plot"], return_tensors="pt")
    states = {
        name: transformers.AutoModel.from_pretrained(name)(**batch).last_hidden_state.detach()
        for name in ("encoder", "cut", "recovered")
    }
    gap = {name: float((states[name] - states["encoder"]).square().mean()) for name in ("cut", "recovered")}
    assert gap["recovered"] < gap["cut"]
    report = f"report --models encoder recovered --output_dir report {pairs} --latency_repeats 1"
    assert main(f"{report} --latency_batch_sizes 1 --device cpu".split()) == 0
    found = json.loads((place / "report" / "report.json").read_text())
    assert (found["metric"], found["num_examples"]) == ("spearman", 32)


def test_a_plain_encoder_gets_mean_pooling(place, pairs):
    prune = "prune-structure --model_name_or_path encoder --output_dir cut --mac_ratio 0.5 --calibration_samples 32"
    assert main(f"{prune} {pairs} --task_kind sentence-embedding --device cpu".split()) == 0
    modules = json.loads((place / "cut" / "modules.json").read_text())
    assert [part["type"].rpartition(".")[2] for part in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((place / "cut" / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def test_no_other_task_writes_these_files(place, model, tokenizer):
    save_stage("other", model("bert"), tokenizer, {})
    assert not (place / "other" / "modules.json").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("finetune --model_name_or_path encoder --output_dir out {data} --task_kind sentence-embedding",
         "sentence-embedding has no loss of its own"),
        ("distill --model_name_or_path encoder --teacher_name_or_path encoder --output_dir out {data} "
         "--task_kind sentence-embedding --alpha_layer 1", "alpha_task must be 0"),
        ("evaluate --models encoder {data} --task_kind sentences", "task_kind must be one of sequence-classification"),
        ("evaluate --models encoder {data} --task_kind sentence-embedding --split train", "no pairs to measure on"),
        ("evaluate --models writer {data} --window_stride 64", "window_stride must be in 0..max_length - 1"),
    ],
)  # fmt: skip
def test_what_a_kind_cannot_do_is_one_line(place, pairs, capsys, command, message):
    assert main(command.format(data=pairs).split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
