"""Queries with passages: how they are read, scored, ordered, learned, and taught without labels.

The oracles are loops over single pairs without padding, sorting by hand, and torch's own cross-entropy.
"""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.report.quality import evaluated
from hf_compress.stages.measured import measured
from hf_compress.tasks.pair_inputs import read_pairs_separately_
from hf_compress.tasks.reranking import Reranking, ranks_by_query
from hf_compress.tasks.retrieval import RetrievalAnswers
from hf_compress.tasks.sources import DataArguments, load_task
from tests.labelled_models import write_rows


pytestmark = pytest.mark.filterwarnings("ignore")

DATA = "--data_dir data --max_length 48 --task_kind reranking"
QUICK = "--learning_rate 2e-3 --per_device_train_batch_size 16 --report_to none --device cpu --save_strategy no"


@pytest.fixture
def place(tmp_path, monkeypatch, model, tokenizer, sentences):
    """An encoder; eight queries of six passages each, of which those with the query's second word are relevant."""
    monkeypatch.chdir(tmp_path)
    model("bert").save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    texts = [text for text, _ in sentences]
    rows = [
        {"query": texts[i], "passage": text, "label": float(texts[i].split()[1] in text.split())}
        for i in range(8) for text in texts[8 + i : 14 + i]
    ]  # fmt: skip
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    write_rows(tmp_path / "plain" / "train.jsonl", [{k: row[k] for k in ("query", "passage")} for row in rows])
    write_rows(tmp_path / "plain" / "validation.jsonl", rows)
    return tmp_path


def task_of(folder="data", **settings):
    return load_task(DataArguments(data_dir=folder, max_length=48, task_kind="reranking", **settings))


def scorer(tokenizer, labels=1):
    """A model with that many scores, in the folder `scorer`."""
    settings = {"num_labels": labels, "problem_type": "multi_label_classification"}
    torch.manual_seed(0)
    net = transformers.AutoModelForSequenceClassification.from_pretrained("encoder", **settings)
    torch.nn.init.normal_(net.classifier.weight)
    net.save_pretrained("scorer")
    tokenizer.save_pretrained("scorer")
    return net.eval()


def by_hand(queries, scores, relevant):
    """Sort the passages of each query, the irrelevant ones first among equals."""
    ranks = []
    for query in dict.fromkeys(queries):
        rows = [row for row, each in enumerate(queries) if each == query]
        ordered = sorted(rows, key=lambda row: (-scores[row], relevant[row]))
        flags = [bool(relevant[row]) for row in ordered]
        if any(flags) and not all(flags):
            ranks.append(flags.index(True))
    return ranks


def test_ranks_are_those_of_sorting():
    generator = np.random.default_rng(0)
    queries = [f"q{number}" for number in generator.integers(20, size=200)]
    relevant = generator.random(200) < 0.15
    # Few values, so that many are equal.
    for scores in (generator.standard_normal(200), generator.integers(4, size=200).astype(float)):
        expected = by_hand(queries, scores, relevant)
        assert ranks_by_query(queries, scores, relevant).tolist() == expected
        assert len(set(expected)) > 3


def test_a_score_that_is_no_number_never_helps():
    relevant = np.array([True, False, False])
    assert ranks_by_query(["a"] * 3, np.array([np.nan, 0.0, 1.0]), relevant).tolist() == [2]
    assert ranks_by_query(["a"] * 3, np.array([0.5, np.nan, 0.0]), relevant).tolist() == [1]


def test_a_query_is_judged_by_the_order_of_its_passages(place, tokenizer):
    net = scorer(tokenizer)
    task = task_of()
    assert type(task) is Reranking
    assert (task.main_metric, task.measured_split(), task.has_own_loss) == ("mrr", "validation", True)
    answers = evaluated(measured("scorer", task, "validation", 48), batch_size=5)
    rows = task.split("validation")
    with torch.no_grad():
        scores = [
            float(net(**tokenizer(row["query"], row["passage"], return_tensors="pt")).logits[0, 0]) for row in rows
        ]
    ranks = by_hand(rows["query"][:], scores, np.array(rows["label"][:]) > 0)
    assert answers.ranks.tolist() == ranks
    assert len(set(ranks)) > 1
    assert answers.metrics()["mrr"] == pytest.approx(sum(1 / (1 + rank) for rank in ranks) / len(ranks))


def test_the_loss_is_cross_entropy_of_the_probability(place, tokenizer):
    net = scorer(tokenizer)
    task = task_of()
    rows = task.encode("train", tokenizer, 48)
    assert rows[0]["labels"] == [task.split("train")[0]["label"]]
    batch = task.collator(tokenizer)([rows[i] for i in range(7)])
    found = net(**batch)
    expected = torch.nn.functional.binary_cross_entropy(torch.sigmoid(found.logits), batch["labels"])
    assert batch["labels"].shape == (7, 1)
    torch.testing.assert_close(found.loss, expected)


def test_what_is_drawn_to_measure_on_are_whole_queries(place):
    rows = task_of(max_eval_samples=20, max_train_samples=10)
    assert len(rows.split("train")) == 10
    drawn = rows.split("validation")
    whole = task_of().split("validation")
    assert len(drawn) == 18
    for query in set(drawn["query"]):
        assert drawn["query"][:].count(query) == whole["query"][:].count(query) == 6
    assert len(task_of(max_eval_samples=2).split("validation")) == 6


def test_a_reranker_learns_shrinks_and_is_taught_without_labels(place):
    train = f"finetune --model_name_or_path encoder --output_dir dense {DATA} {QUICK} --num_train_epochs 4"
    assert main(train.split()) == 0
    config = json.loads((place / "dense" / "config.json").read_text())
    assert (config["problem_type"], list(config["id2label"])) == ("multi_label_classification", ["0"])
    prune = f"prune-structure --model_name_or_path dense --output_dir cut {DATA} --mac_ratio 0.4 --device cpu"
    assert main(f"{prune} --target dense --allocation divergence --calibration_samples 32".split()) == 0
    plain = DATA.replace("data_dir data", "data_dir plain")
    teach = f"distill --model_name_or_path cut --teacher_name_or_path dense --output_dir taught {plain} {QUICK}"
    assert main(f"{teach} --alpha_task 0 --alpha_output 1 --num_train_epochs 30".split()) == 0
    assert main(f"evaluate --models dense cut taught --output_file out.json --device cpu {DATA}".split()) == 0
    found = json.loads((place / "out.json").read_text())
    results = json.loads((place / "taught" / "results.json").read_text())
    assert results["eval_mrr"] == pytest.approx(found["taught"]["mrr"])
    # Closer to its teacher in the scores themselves.
    task = task_of()
    names = ("dense", "cut", "taught")
    scores = {name: _scores(measured(name, task, "validation", 48)) for name in names}
    apart = {name: float((scores[name] - scores["dense"]).square().mean()) for name in names}
    assert apart["taught"] < apart["cut"] / 2


@torch.no_grad()
def _scores(found):
    batch = found.processor.pad(found.rows.remove_columns("labels")[:], return_tensors="pt")
    return found.model.eval()(**batch).logits


def test_packed_weights_order_as_the_numbers_they_stand_for(place, tokenizer):
    scorer(tokenizer)
    quantise = f"quantize --model_name_or_path scorer --output_dir packed {DATA} --bits 4 --device cpu"
    assert main(quantise.split()) == 0
    packed = measured("packed", task_of(), "validation", 48)
    ranks, scores = evaluated(packed).ranks, _scores(packed)
    hc.dequantize(packed.model)
    assert evaluated(packed).ranks.tolist() == ranks.tolist()
    torch.testing.assert_close(_scores(packed), scores)
    assert not torch.equal(scores, _scores(measured("scorer", task_of(), "validation", 48)))


def test_a_reranker_whose_config_names_no_loss_learns_by_cross_entropy(place, tokenizer):
    net = scorer(tokenizer)
    net.config.problem_type = None
    net.save_pretrained("scorer")
    train = f"finetune --model_name_or_path scorer --output_dir out {DATA} {QUICK} --max_steps 1 --logging_steps 1"
    assert main(train.split()) == 0
    assert json.loads((place / "out" / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_several_relevant_passages_are_one_hit():
    relevant = np.array([True, *[False] * 10, True])
    ranks = ranks_by_query(["a"] * 12, -np.arange(12.0), relevant)
    answers = RetrievalAnswers(ranks, share="hit_rate")
    assert answers.metrics() == {"hit_rate_at_1": 1.0, "hit_rate_at_10": 1.0, "mrr": 1.0}
    assert answers.at(np.array([0, 0])).metrics() == answers.metrics()


def test_a_report_counts_queries(place, tokenizer):
    scorer(tokenizer)
    report = f"report --models scorer --output_dir report {DATA} --latency_repeats 1 --latency_batch_sizes 1"
    assert main(f"{report} --device cpu".split()) == 0
    found = json.loads((place / "report" / "report.json").read_text())
    assert (found["metric"], found["num_examples"]) == ("mrr", 8)


@pytest.mark.parametrize(
    ("command", "rows", "message"),
    [
        ("evaluate --models scorer", [{"query": "a", "passage": "b", "label": 2}], "relevance between 0 and 1, got 2"),
        ("evaluate --models scorer", [{"text": "a", "label": 1}], "a column of queries and one of passages"),
        ("evaluate --models scorer", [{"query": "a", "passage": "b"}], "has no column of labels to measure by"),
        ("evaluate --models scorer", [{"query": "a", "passage": "b", "label": 1}], "and others (0), got none"),
        ("evaluate --models many", None, "its head gives 3 scores, and a reranker must give a single one"),
        ("finetune --model_name_or_path encoder --output_dir out", [{"query": "a", "passage": "b"}],
         "reranking has no loss of its own"),
        ("evaluate --models scorer --label_column rell", None, "label_column 'rell' is no column of"),
        ("distill --model_name_or_path scorer --teacher_name_or_path scorer --output_dir out --alpha_task 0 "
         "--eval_strategy epoch", [{"query": "a", "passage": "b"}], "no split to measure on, got 'epoch'"),
        ("distill --model_name_or_path scorer --teacher_name_or_path scorer --output_dir out",
         [{"query": "a", "passage": "b"}], "alpha_task must be 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_one_line(place, tokenizer, capsys, command, rows, message):
    scorer(tokenizer)
    if "many" in command:
        scorer(tokenizer, labels=3)
        (place / "scorer").rename("many")
    if rows is not None:
        for split in ("train", "validation"):
            write_rows(place / "data" / f"{split}.jsonl", rows)
    assert main(f"{command} {DATA} --device cpu".split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


def test_a_model_of_two_texts_is_refused(place, tokenizer):
    with pytest.raises(ValueError, match="must read query and passage together"):
        task_of().encode("train", read_pairs_separately_(copy.deepcopy(tokenizer)), 48)


def test_sentence_transformers_opens_it(place, tokenizer):
    pytest.importorskip("sentence_transformers")
    scorer(tokenizer)
    prune = f"prune-structure --model_name_or_path scorer --output_dir cut {DATA} --mac_ratio 0.5 --device cpu"
    assert main(f"{prune} --calibration_samples 32".split()) == 0
    pairs = [("the good film", "a bad plot"), ("a film", "the plot was good and the film was bad")]
    program = (
        "import hf_compress, json; from sentence_transformers import CrossEncoder; "
        f"print(json.dumps(CrossEncoder('cut', device='cpu').predict({pairs!r}).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    net = transformers.AutoModelForSequenceClassification.from_pretrained("cut")
    with torch.no_grad():
        expected = [float(torch.sigmoid(net(**tokenizer(*pair, return_tensors="pt")).logits)) for pair in pairs]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_a_test_split_whose_labels_are_unknown_is_left_out(place):
    rows = [{"query": "a film", "passage": "the film", "label": -1}] * 4
    write_rows(place / "data" / "test.jsonl", rows)
    assert list(task_of().splits) == ["train", "validation"]
    write_rows(place / "data" / "validation.jsonl", [{"query": "a", "passage": "b", "target": 1}])
    with pytest.raises(ValueError, match=r"validation.jsonl' must have the columns label"):
        task_of()
