"""Mistakes of a first hour that used to end in a traceback, a useless model or a message about something else."""

import csv

import datasets
import peft
import pytest

import hf_compress as hc
from hf_compress.cli.main import main


HEAD = "sequence_classification"


@pytest.fixture
def folder(tmp_path, model, tokenizer, sentences):
    """An encoder without a head, a classifier, and 64 rows in which one column numbers the rows."""
    model("bert").save_pretrained(tmp_path / "encoder")
    model("bert", HEAD).save_pretrained(tmp_path / "dense")
    for name in ("encoder", "dense"):
        tokenizer.save_pretrained(tmp_path / name)
    for split in ("train", "validation"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "text", "label"])
            rows.writerows([number, text, label] for number, (text, label) in enumerate(sentences))
    return tmp_path


# What is typed after `--data_dir .` -> what the one line says.
FINETUNE, PRUNE = "finetune --model_name_or_path", "prune-structure --model_name_or_path dense"
MISTAKES = {
    f"{FINETUNE} encoder --label_column id --output_dir out": "id has 64 classes in the 64 rows of train",
    f"{FINETUNE} dnse --output_dir out": "there is no folder 'dnse' here. Did you mean 'dense'? As a name on the",
    "distill --model_name_or_path dense --teacher_name_or_path encoder --output_dir out": "fine-tune it first",
    f"{PRUNE} --freeze_embeddings true --output_dir out": "freeze_embeddings",
    f"{PRUNE} --dropout 0 --output_dir out": "dropout must be left out",
    f"{FINETUNE} dense --dropout 1 --output_dir out": "dropout must be in [0, 1), got 1.0",
    f"{PRUNE} --max_eval_samples 9 --output_dir out": "max_eval_samples",
    "report --models dense --output_dir dense": "is the folder of the model dense",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_the_line_says_what_to_change(folder, monkeypatch, capsys, line):
    monkeypatch.chdir(folder)
    assert main([*line.split(), "--data_dir", ".", "--max_length", "32"]) == 2
    assert MISTAKES[line] in capsys.readouterr().err
    assert not (folder / "out" / "config.json").exists()


@pytest.mark.parametrize("line", [
    "evaluate --models dnse", "prune-structure --model_name_or_path dnse --output_dir out",
    "quantize --model_name_or_path dnse --output_dir out",
])  # fmt: skip
def test_texts_alone_do_not_hide_a_mistyped_model(folder, monkeypatch, capsys, line):
    monkeypatch.chdir(folder)
    (folder / "texts").mkdir()
    for split in ("train", "validation"):
        (folder / "texts" / f"{split}.csv").write_text("text\n" + "a good film\n" * 9)
    assert main([*line.split(), "--data_dir", "texts"]) == 2
    said = capsys.readouterr().err
    assert "there is no folder 'dnse' here" in said
    assert "task_kind" not in said


def test_a_label_of_validation_alone_is_not_the_models_fault(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with open("validation.csv", "a", newline="") as file:
        csv.writer(file).writerow([64, "good film", 7])
    line = "finetune --model_name_or_path encoder --data_dir . --max_length 32 --output_dir out"
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert "which no row of train has" in said
    assert "No classifier" not in said


def trainer_on(rows, model, tokenizer, folder):
    args = hc.DistillationArguments(
        str(folder), alpha_output=0.0, max_steps=1, report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    return hc.CompressionTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("column", "labels", "said"),
    [("mood", [0, 1], "no labels.*'label' or 'labels'"), ("label", ["bad", "good"], "texts in the column 'label'")],
)
def test_labels_that_a_trainer_cannot_read(tmp_path, model, tokenizer, sentences, column, labels, said):
    encoded = tokenizer([text for text, _ in sentences])
    rows = datasets.Dataset.from_dict({**encoded, column: [labels[label] for _, label in sentences]})
    with pytest.raises(ValueError, match=said):
        trainer_on(rows, model("bert", HEAD), tokenizer, tmp_path).train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_to_be_merged_first(model):
    adapted = peft.get_peft_model(model("bert", HEAD), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="merge_and_unload"):
        hc.compress(adapted, hc.StructuredPruningConfig(), data=[])
