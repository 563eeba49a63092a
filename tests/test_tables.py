"""Tables of texts: every usual shape reads alike, and what cannot be used is refused by file, column and row."""

from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_compress.cli.main import main
from hf_compress.tasks.sources import DataArguments, load_task
from tests.labelled_models import write_rows


ROWS = [("a fine film", "good"), ('so "bad", it hurts', "bad"), ("plain\nand long", "bad"), ("NA", "good")]
SHAPES = {
    "usual": ("text", "label"),
    "sentence": ("sentence", "label"),
    "intents": ("utterance", "intent"),
    "search": ("query", "category"),
    "questions": ("question", "labels"),
    "reviews": ("review", "sentiment"),
    "spreadsheet": ("Text", "Label"),
    "web": ("content", "target"),
    "classes": ("text", "class"),
}


def load(**arguments):
    return load_task(DataArguments(**arguments))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_usual_shapes_read_alike(tmp_path, shape, suffix):
    text, label = SHAPES[shape]
    # What no task needs may be anything.
    rows = [{"idx": i, text: t, label: y} for i, (t, y) in enumerate(ROWS)]
    if suffix in (".json", ".jsonl", ".parquet"):
        rows = [{**row, "nested": {"a": [1, 2]}} for row in rows]
    task = load(train_file=str(write_rows(tmp_path / f"rows{suffix}", rows)))
    assert task.text_columns == (text,)
    assert task.label_names == ("bad", "good")
    assert task.split("train")[text][:] == [t for t, _ in ROWS]
    assert task.split("train")["label"][:] == [1, 0, 0, 1]


def test_named_columns_win(tmp_path):
    rows = [{"text": "x", "first": "a", "second": "b", "label": 0, "mine": 1 - i % 2} for i in range(2)]
    file = str(write_rows(tmp_path / "rows.csv", rows))
    names = {"text_column": "first", "text_pair_column": "second", "label_column": "mine"}
    task = load(train_file=file, **names)
    assert task.text_columns == ("first", "second")
    assert task.split("train")["label"][:] == [1, 0]


def test_tabs_without_quotes(tmp_path):
    # A quote that opens a text is a character of it, not the beginning of a field of several lines.
    file = tmp_path / "train.tsv"
    file.write_text('text\tlabel\n"so he said\t1\nno\t0\n"and she\t1\n')
    assert load(train_file=str(file)).split("train")["text"][:] == ['"so he said', "no", '"and she']


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_may_be_long(tmp_path, suffix):
    rows = [{"text": "word, " * 40_000, "label": "a"}, {"text": "short", "label": "b"}]
    task = load(train_file=str(write_rows(tmp_path / f"train{suffix}", rows)))
    assert [len(text) for text in task.split("train")["text"]] == [240_000, 5]


def test_class_names_of_a_file(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["up", "even", "down"])})
    for split, labels in (("train", [0, 1]), ("validation", [2])):
        Dataset.from_dict({"text": ["x"] * len(labels), "label": labels}, features=kinds).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    task = load(data_dir=str(tmp_path))
    assert task.label_names == ("up", "even", "down")
    assert task.split("validation")["label"][:] == [2]


def test_categories_of_pandas(tmp_path):
    table = pyarrow.table({"text": ["x", "y"], "label": pyarrow.array(["b", "a"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert load(data_dir=str(tmp_path)).split("train")["label"][:] == [1, 0]


def test_a_folder_calls_its_validation_file_as_it_likes(tmp_path, caplog):
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        write_rows(tmp_path / name, [{"text": name, "label": i % 2} for i in range(4)])
    task = load(data_dir=str(tmp_path))
    assert task.measured_split() == "validation"
    assert task.split("validation")["text"][0] == "dev.tsv"
    write_rows(tmp_path / "train.csv", [{"text": "other", "label": i % 2} for i in range(4)])
    assert load(data_dir=str(tmp_path)).split("train")["text"][0] == "train.tsv"
    assert "not read: train.csv" in caplog.text


@pytest.mark.parametrize("hidden", ["-1", None])
def test_a_test_split_without_labels_is_left_out_aloud(tmp_path, caplog, hidden):
    write_rows(tmp_path / "train.tsv", [{"text": "x", "label": i % 2} for i in range(4)])
    column = {} if hidden is None else {"label": hidden}
    write_rows(tmp_path / "test.tsv", [{"text": "x", **column} for _ in range(4)])
    task = load(data_dir=str(tmp_path))
    assert list(task.splits) == ["train"]
    assert "test.tsv' has no labels: it is left out" in caplog.text
    with pytest.raises(ValueError, match="neither a validation nor a test split"):
        task.measured_split()


def test_published_pairs_may_have_an_empty_side(tmp_path):
    rows = [{"question1": "", "question2": "b", "label": 1}, {"question1": "a", "question2": "c", "label": 0}]
    file = str(write_rows(tmp_path / "train.tsv", rows))
    assert len(load(train_file=file, task_name="qqp").split("train")) == 2
    with pytest.raises(ValueError, match="question1 must not be empty, row 1 is"):
        load(train_file=file)


# name -> (file content, what the line says); a row is counted from 1, without the header.
BAD = {
    "empty-text.csv": ("text,label\na,1\n ,0\n", "text must not be empty, row 2 is"),
    "empty-row.csv": ("text,label\na,1\n,\n", "text must not be empty, row 2 is"),
    "null-text.jsonl": ('{"text": "a", "label": 1}\n{"text": null, "label": 0}\n', "text must be .* row 2 has none"),
    "no-text.jsonl": ('{"text": "a", "label": 1}\n{"label": 0}\n', "text must be a text in every row, row 2 has none"),
    "number-text.json": ('[{"text": 3, "label": 1}]', r"row 1 has 3 \(int\)"),
    "list-text.json": ('[{"text": ["a"], "label": 1}]', r"row 1 has \['a'\] \(list\)"),
    "empty-label.tsv": ("text\tlabel\na\t1\nb\t\n", "label must be filled in every row, it is empty in row 2"),
    "null-label.json": ('[{"text": "a", "label": 1}, {"text": "b", "label": null}]', "it is empty in row 2"),
    "nan-label.json": ('[{"text": "a", "label": 1.5}, {"text": "b", "label": NaN}]', "it is empty in row 2"),
    "nan-label.csv": ("text,label\na,1\nb,nan\n", "it is empty in row 2"),
    "infinite-label.json": ('[{"text": "a", "label": 1.5}, {"text": "b", "label": Infinity}]', "finite.* in row 2"),
    "mixed-label.jsonl": ('{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "a text in row 2 .* row 1"),
    "mixed-label.csv": ("text,label\na,1\nb,x\n", "a text in row 2 .* row 1"),
    "list-label.json": ('[{"text": "a", "label": [1]}]', r"one class or number, got \[1\] \(list\) in row 1"),
    "object-label.json": ('[{"text": "a", "label": {"x": 1}}]', "one class or number"),
    "negative-label.csv": ("text,label\na,1\nb,-1\nc,0\n", "class id of 0 or more .*got -1 in row 2"),
    "header-only.csv": ("text,label\n", "at least one row, got none"),
    "empty.csv": ("", "must not be empty"),
    "blank.csv": ("\n\n", "at least one row, got none"),
    "no-objects.json": ("[]", "has the columns|at least one row"),
    "two-columns.csv": ("text,label,label\na,1,1\n", "the column 'label' more than once"),
    "semicolons.csv": ("text;label\na;1\n", "only the column 'text;label': its columns must be separated by commas"),
    "commas.tsv": ("text,label\na,1\n", "only the column 'text,label': its columns must be separated by tabs"),
    "too-wide.csv": ("text,label\na,1\nb, and c,0\n", "has 2 columns, but row 2 has 3"),
    "too-narrow.csv": ("text,label\na,1\nb\n", "has 2 columns, but row 2 has 1"),
    "open-quote.csv": ('text,label\n"a,1\nb,0\n', "quote"),
    "inner-quote.csv": ('text,label\n"he "said" so",1\n', "A quote inside a quoted text must be doubled"),
    "latin.csv": ("text,label\ncaf\xe9,1\n".encode("latin-1"), r"not text in UTF-8 \(line 2\)"),
    "utf16.csv": ("text,label\na,1\n".encode("utf-16"), "not text in UTF-8"),
    "binary.csv": (b"text,label\na\0b,1\n", "binary data in line 2"),
    "cut.json": ('[{"text": "a", "label": 1}, {"te', "cannot be read as JSON"),
    "cut.jsonl": ('{"text": "a", "label": 1}\n{"te', "cannot be read as JSON"),
    "deep.json": ("[" * 100_000, "cannot be read as JSON"),
    "numbers.json": ("[1, 2]", "must hold objects"),
    "a-text.json": ('"hello"', "must hold objects"),
    "cut.parquet": (b"PAR1 and then nothing", "cannot be read as Parquet"),
    "other.xlsx": ("x", "must end in one of"),
    "strange.csv": ("blurb,label\na,1\n", "columns blurb, label: name the one with the texts by --text_column"),
    "no-label.csv": ("text,points\na,1\n", "columns text, points: name .* labels by --label_column"),
    "two-texts.csv": ("query,review,label\na,b,1\n", "columns query and review: choose one with --text_column"),
    "two-labels.csv": ("text,intent,topic\na,1,2\n", "columns intent and topic: choose one with --label_column"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, monkeypatch, capsys):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load(train_file=str(tmp_path / name))
    assert name in str(caught.value)
    # The command line says it in one line, before it opens a model.
    monkeypatch.chdir(tmp_path)
    assert main(f"finetune --model_name_or_path nowhere --train_file {name} --output_dir out --use_cpu".split()) == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [["a"], ["b"]], "label": [0, 1]}, r"row 1 has \['a'\] \(list\)"),
        ({"text": ["a", None], "label": [0, 1]}, "row 2 has none"),
        ({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}]}, "one class or number"),
        ({"text": ["a", "b"], "label": np.array([1.5, np.nan])}, "it is empty in row 2"),
        ({"text": [b"\xff", b"a"], "label": [0, 1]}, r"row 1 has .*\(bytes\)"),
        ({"text": [], "label": []}, "at least one row"),
    ],
)
def test_bad_columns_of_parquet(tmp_path, table, message):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        load(train_file=str(tmp_path / "rows.parquet"))


def test_damaged_pages_of_parquet(tmp_path):
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(2000)]
    file = write_rows(tmp_path / "rows.parquet", rows)
    raw = bytearray(file.read_bytes())
    raw[4:400] = b"\xff" * 396
    file.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="cannot be read as Parquet|row 1"):
        load(train_file=str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dir": "{}", "train_file": "{}/train.csv"}, "data_dir and train_file both say"),
        ({"data_dir": "{}", "test_file": "{}/train.csv"}, "data_dir and test_file both say"),
        ({"data_dir": "{}", "text_column": "body"}, "text_column 'body' is no column of .*, which has text, label"),
        ({"data_dir": "{}", "label_column": "body"}, "label_column 'body' is no column"),
        ({"data_dir": "{}", "text_pair_column": "label"}, "needs text_column"),
        ({"data_dir": "{}", "text_column": "text", "text_pair_column": "text"}, "must be two columns"),
        ({"data_dir": "{}", "text_column": "text", "label_column": "text"}, "must be different columns"),
        ({"train_file": "{}"}, "must exist and be a file"),
        ({"train_file": "{}/train.csv", "validation_file": "{}/other.csv"}, "must have the columns .*missing: text"),
    ],
)
def test_contradictions_are_refused(tmp_path, arguments, message):
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "other.csv").write_text("blurb,label\na,1\nb,0\n")
    with pytest.raises(ValueError, match=message):
        load(**{name: value.format(tmp_path) for name, value in arguments.items()})


def test_one_label_of_minus_one_drops_no_split(tmp_path):
    for split, last in (("train", 1), ("validation", -1), ("test", -1)):
        write_rows(tmp_path / f"{split}.csv", [{"text": "a", "label": 0}, {"text": "b", "label": last}])
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"{split}.csv': label must be a class id of 0 or more .* in row 2"):
            load(train_file=f"{tmp_path}/train.csv", **{f"{split}_file": f"{tmp_path}/{split}.csv"})
