"""Every kind of task: what its rows are, and that its metrics are those that other code computes.

The oracles are loops over single examples without padding, seqeval, scikit-learn, scipy, and answers by hand.
"""

import io
import json
import math

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
import torch
import transformers
from datasets import Dataset
from PIL import Image
from scipy import stats
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace

from hf_compress.report.quality import evaluated, standard_error
from hf_compress.stages.measured import measured
from hf_compress.stages.models import open_model
from hf_compress.tasks.kinds import TASK_KINDS
from hf_compress.tasks.language_modeling import LanguageModeling
from hf_compress.tasks.question_answering import QuestionAnswering, SpanAnswers
from hf_compress.tasks.retrieval import ranks_of
from hf_compress.tasks.sentence_embedding import SentenceEmbedding
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.sources import DataArguments, load_task
from hf_compress.tasks.token_classification import TagAnswers, TokenClassification
from tests.images_and_sounds import opens_images
from tests.labelled_models import write_rows


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def folder(path, **splits):
    for split, rows in splits.items():
        if any(isinstance(value, bytes) for value in rows[0].values()):
            path.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(path / f"{split}.parquet")
        else:
            write_rows(path / f"{split}.jsonl", rows)
    return DataArguments(data_dir=str(path), max_length=32)


def saved(path, model, tokenizer, **config):
    model.config.update(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def found_by(name, task, **settings):
    return evaluated(measured(name, task, "validation", 32), **settings)


def words(sentences):
    return [text.split() for text, _ in sentences]


# Sequence classification with several labels


@pytest.fixture
def several(tmp_path, sentences):
    """Rows that name each of three properties that a text has."""
    rules = {"good": lambda t: "good" in t, "film": lambda t: "film" in t, "long": lambda t: len(t) > 6}
    rows = [{"text": t, "labels": [n for n, rule in rules.items() if rule(t.split())]} for t, _ in sentences]
    return folder(tmp_path / "several", train=rows, validation=rows[:32])


def test_texts_with_several_labels(tmp_path, several, tokenizer):
    task = load_task(several)
    assert (type(task), task.several, task.label_names) == (SequenceClassification, True, ("film", "good", "long"))
    assert task.main_metric == "f1"
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        # The model's order is another one.
        id2label={0: "long", 1: "film", 2: "good"}, label2id={"long": 0, "film": 1, "good": 2},
        problem_type="multi_label_classification", initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    name = saved(tmp_path / "model", model, tokenizer)
    answers = found_by(name, task, batch_size=5)
    rows = task.split("validation")
    with torch.no_grad():
        one = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in rows["text"]]
    answered = np.array([[logits[i] > 0 for i in (1, 2, 0)] for logits in one])
    right = np.array([[i in labels for i in range(3)] for labels in rows["label"]])
    metrics = answers.metrics()
    assert metrics["f1"] == pytest.approx(sklearn.metrics.f1_score(right, answered, average="micro", zero_division=0))
    assert metrics["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(right, answered))
    gathered = np.array([logits.numpy() for logits in one])
    encoded = task.matched(config).encode("validation", tokenizer, 32)
    assert task.matched(config).training_metrics(gathered, np.array(encoded["labels"])) == pytest.approx(metrics)
    assert answers.right().tolist() == (right == answered).all(-1).tolist()


def test_a_new_head_for_several_labels(tmp_path, several, model, tokenizer):
    task = load_task(several)
    name = saved(tmp_path / "encoder", model("bert"), tokenizer)
    found = open_model(name, task, fresh_head=True)
    assert found.config.problem_type == "multi_label_classification"
    assert found.config.id2label == {0: "film", 1: "good", 2: "long"}
    plain = saved(tmp_path / "plain", model("bert", "sequence_classification"), tokenizer,
                      problem_type="single_label_classification")  # fmt: skip
    with pytest.raises(ValueError, match="one label for a text .*, the task .* has lists of labels"):
        found_by(plain, task)


def test_lists_of_a_single_label_are_a_mistake(tmp_path):
    data = folder(tmp_path / "x", train=[{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y"]}])
    with pytest.raises(ValueError, match="one class or number"):
        load_task(data)


# Token classification


@pytest.fixture
def tagged(tmp_path, sentences):
    """Words with tags, entities of one and of several words among them."""
    tags = {"good": "B-PER", "film": "I-PER", "bad": "B-LOC", "plot": "I-LOC", "cast": "B-LOC"}
    rows = [{"tokens": w, "ner_tags": [tags.get(word, "O") for word in w]} for w in words(sentences)]
    return folder(tmp_path / "tagged", train=rows, validation=rows[:32])


@pytest.fixture
def tagger(tmp_path, tokenizer):
    # The order of the model's labels is another than that of the files.
    names = TAGS[::-1]
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(2)
    return saved(tmp_path / "tagger", transformers.BertForTokenClassification(config), tokenizer)


def test_tags_of_words(tmp_path, tagged, tagger, tokenizer):
    task = load_task(tagged)
    assert type(task) is TokenClassification
    assert (task.label_names, task.main_metric) == (tuple(sorted(TAGS)), "f1")
    answers = found_by(tagger, task, batch_size=5)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tagger)
    rows = json.loads("[" + ",".join((tmp_path / "tagged" / "validation.jsonl").read_text().splitlines()) + "]")
    gold, predicted = [row["ner_tags"] for row in rows], []
    for row in rows:
        # Each word is one token here, between [CLS] and [SEP].
        ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(row["tokens"]), tokenizer.sep_token_id]
        with torch.no_grad():
            tags = model(input_ids=torch.tensor([ids])).logits[0, 1:-1].argmax(-1)
        predicted.append([model.config.id2label[int(tag)] for tag in tags])
    metrics = answers.metrics()
    assert metrics["f1"] == pytest.approx(seqeval.metrics.f1_score(gold, predicted))
    assert 0 < metrics["f1"] < 1
    assert metrics["precision"] == pytest.approx(seqeval.metrics.precision_score(gold, predicted))
    assert metrics["recall"] == pytest.approx(seqeval.metrics.recall_score(gold, predicted))
    assert metrics["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(gold, predicted))
    assert answers.describe(3) == (" ".join(gold[3]), " ".join(predicted[3]))
    drawn = np.array([3, 3, 7, 0])
    again = answers.at(drawn).metrics()["f1"]
    assert again == pytest.approx(seqeval.metrics.f1_score([gold[i] for i in drawn], [predicted[i] for i in drawn]))


def test_only_the_first_part_of_a_word_has_a_tag(tagged, tokenizer):
    letters = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        model_max_length=64,
        pad_token="[PAD]",
    )
    letters.backend_tokenizer.pre_tokenizer = Sequence([Whitespace(), Split(Regex("."), "isolated")])
    task = load_task(tagged)
    row = task.encode("validation", letters, 64)[0]
    sentence = task.split("validation")[0]
    # [CLS], then a token for each letter, then [SEP].
    parts = [[tag] + [-100] * (len(word) - 1) for word, tag in zip(sentence["tokens"], sentence["label"], strict=True)]
    assert row["labels"] == [-100, *(label for part in parts for label in part), -100]


def test_words_beyond_the_longest_input_are_told(tagged, tokenizer, caplog):
    task = load_task(tagged)
    rows = task.encode("validation", tokenizer, 6)
    lost = sum(max(0, len(words) - 4) for words in task.split("validation")["tokens"])
    assert f"{lost} words of validation are beyond max_length=6" in caplog.text
    assert max(map(len, rows["labels"])) == 6


def test_gathered_tags_have_the_same_metrics(tagged, tagger):
    task = load_task(tagged)
    each = measured(tagger, task, "validation", 32)
    batch = each.task.collator(each.processor)([
        {k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in each.rows
    ])  # fmt: skip
    with torch.no_grad():
        logits = each.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predictions = each.task.training_outputs((logits,), batch["labels"]).numpy()
    assert each.task.training_metrics(predictions, batch["labels"].numpy()) == evaluated(each).metrics()


def test_parts_of_speech_have_the_mean_f1_of_tags():
    gold, found = [np.array([0, 1, 2, 1]), np.array([2, 2])], [np.array([0, 1, 1, 1]), np.array([2, 0])]
    flat = [np.concatenate(tags) for tags in (gold, found)]
    metrics = TagAnswers(gold, found, ("NOUN", "VERB", "ADJ")).metrics()
    assert metrics == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx(sklearn.metrics.f1_score(*flat, average="macro")),
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"row 2 has 2 words in tokens, but 1 tags"),
        ({"tokens": ["a"], "tags": [""]}, r"tags must be filled in every row, it is empty in row 2"),
        ({"tokens": "a", "tags": ["O"]}, r"tokens holds lists, but 'a' in row 2"),
        ({"tokens": [3], "tags": ["O"]}, "tokens must hold lists of texts, got 3"),
    ],
)
def test_odd_tags_are_refused_by_row(tmp_path, row, message):
    data = folder(tmp_path / "odd", train=[{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, row])
    with pytest.raises(ValueError, match=message):
        load_task(data)


# Question answering


@pytest.fixture
def questions(tmp_path, sentences):
    """Long texts of several sentences; the answer is one of its words, in whichever window."""
    rows = []
    for number in range(12):
        text = " ".join(t for t, _ in sentences[number : number + 6])
        answer = text.split()[3 * number]
        start = len(" ".join(text.split()[: 3 * number])) + (number > 0)
        rows.append({"context": text, "question": "the good film", "answer_texts": [answer], "answer_starts": [start]})
    return folder(tmp_path / "questions", train=rows, validation=rows)


def test_answers_are_where_the_positions_point(questions, tokenizer):
    task = load_task(questions)
    assert type(task) is QuestionAnswering
    rows = task.encode("train", tokenizer, 32)
    examples = task.split("train")
    assert len(rows) > len(examples)
    held = set()
    for row in rows:
        example = examples[row["example"]]
        answer, start = example["answers"][0], example["starts"][0]
        if (row["start_positions"], row["end_positions"]) != (0, 0):
            begin, end = row["spans"][row["start_positions"]][0], row["spans"][row["end_positions"]][1]
            assert (example["text"][begin:end], begin) == (answer, start)
            held.add(row["example"])
    # Every answer lies in some window.
    assert held == set(range(len(examples)))


def test_a_model_that_points_at_the_answer_is_right(questions, tokenizer):
    task = load_task(questions)
    rows = task.encode("validation", tokenizer, 32)
    outputs = []
    for row in rows:
        scores = np.full((2, len(row["input_ids"])), -5.0)
        scores[0, row["start_positions"]] = scores[1, row["end_positions"]] = 5.0
        outputs.append(scores)
    assert task.answers("validation", rows, outputs).metrics() == {"exact_match": 1.0, "f1": 1.0}


def test_the_best_span_of_all_windows_by_hand(tmp_path, questions, model, tokenizer):
    task = load_task(questions)
    name = saved(tmp_path / "qa", model("bert", "question_answering"), tokenizer)
    answers = found_by(name, task, batch_size=5)
    net = transformers.AutoModelForQuestionAnswering.from_pretrained(name)
    for number, example in enumerate(task.split("validation")):
        best = (-math.inf, "")
        windows = tokenizer(
            example["question"], example["text"], truncation="only_second", max_length=32, stride=32 // 3,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for w, ids in enumerate(windows["input_ids"]):
            with torch.no_grad():
                out = net(input_ids=torch.tensor([ids]))
            inside = [i for i, part in enumerate(windows.sequence_ids(w)) if part == 1]
            for i in inside:
                for j in inside:
                    if i <= j < i + 30:
                        score = float(out.start_logits[0, i] + out.end_logits[0, j])
                        offsets = windows["offset_mapping"][w]
                        best = max(best, (score, example["text"][offsets[i][0] : offsets[j][1]]))
        assert answers.found[number] == best[1]


@pytest.mark.parametrize(
    ("found", "gold", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "Carolina"], 0, 2 / 3),
        ("in the year 1999", ["1999"], 0, 0.5),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("a", ["the"], 1, 1),
    ],
)
def test_squads_metrics_by_hand(found, gold, exact, f1):
    assert SpanAnswers([gold], [found]).metrics() == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_an_answer_that_is_not_in_the_text_is_refused(tmp_path):
    row = {"context": "a good film", "question": "what", "answers": {"text": ["good"], "answer_start": [3]}}
    with pytest.raises(ValueError, match="row 1 has the answer 'good', which does not begin at character 3"):
        load_task(folder(tmp_path / "q", train=[row]))


# Language modelling


@pytest.fixture
def texts(tmp_path, sentences):
    rows = [{"text": t} for t, _ in sentences]
    return folder(tmp_path / "texts", train=rows, validation=rows[:16])


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_perplexity_window_by_window(tmp_path, texts, model, tokenizer, architecture, separate):
    texts.separate_rows = separate
    name = saved(tmp_path / "lm", model(architecture, "causal_lm"), tokenizer)
    config = transformers.AutoConfig.from_pretrained(name)
    task = load_task(texts, config)
    assert type(task) is LanguageModeling
    answers = found_by(name, task, batch_size=5)
    net = transformers.AutoModelForCausalLM.from_pretrained(name)
    rows = [text for text in task.split("validation")["text"] if text.strip()]
    streams = [tokenizer(text)["input_ids"] for text in (rows if separate else ["\n\n".join(rows)])]
    total, count = 0.0, 0
    for ids in streams:
        # What is left of a running text does not count.
        for start in range(0, len(ids) if separate else len(ids) // 32 * 32, 32):
            window = torch.tensor([ids[start : start + 32]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    # transformers' own loss is the mean over the predicted tokens.
                    total += float(net(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    assert answers.metrics()["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_tokenizer_without_padding_token_can_be_measured(tmp_path, texts, model, tokenizer):
    name = saved(tmp_path / "lm", model("llama", "causal_lm"), tokenizer)
    expected = found_by(name, load_task(texts, transformers.AutoConfig.from_pretrained(name))).metrics()
    settings = json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps(settings))
    task = load_task(texts, transformers.AutoConfig.from_pretrained(name))
    assert measured(name, task, "validation", 32).processor.pad_token is None
    assert found_by(name, task).metrics() == pytest.approx(expected, rel=1e-5)


# Images


@pytest.fixture
def images(tmp_path):
    """Squares that are light or dark."""
    rows = []
    for number in range(24):
        file = io.BytesIO()
        shade = 40 * (number % 2) + 5 * number
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": ("dark", "light")[number % 2]})
    (tmp_path / "images").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(tmp_path / "images" / f"{split}.parquet")
    return DataArguments(data_dir=str(tmp_path / "images"))


@opens_images
@pytest.mark.filterwarnings("ignore")
def test_images_with_a_class(tmp_path, images):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        id2label={0: "light", 1: "dark"}, label2id={"light": 0, "dark": 1}, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    name = saved(tmp_path / "vit", model, processor)
    task = load_task(images)
    assert task.kind == "image-classification"
    answers = evaluated(measured(name, task, "validation", 128))
    right = 0
    for row in task.split("validation"):
        pixels = processor(Image.open(io.BytesIO(row["image"])), return_tensors="pt")
        with torch.no_grad():
            label = model.config.id2label[int(model(**pixels).logits.argmax())]
        right += label == task.label_names[row["label"]]
    assert answers.metrics()["accuracy"] == pytest.approx(right / 24)


def test_a_broken_image_is_refused_by_row(tmp_path, images):
    good = Dataset.from_parquet(str(tmp_path / "images" / "train.parquet"))[0]
    rows = [good, {"image": {"bytes": b"no image", "path": None}, "label": "dark"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "images" / "train.parquet")
    with pytest.raises(ValueError, match="image in row 2 is no image that can be opened"):
        load_task(images)


# Sentence embeddings


@pytest.fixture
def pairs(tmp_path, sentences):
    """Texts alone to learn from, and pairs with scores to measure on."""
    texts = [t for t, _ in sentences]
    scored = [
        {"sentence1": a, "sentence2": b, "score": len(set(a.split()) & set(b.split())) / 2}
        for a, b in zip(texts[:32], texts[32:], strict=True)
    ]
    path = tmp_path / "pairs"
    folder(path, train=[{"text": t} for t in texts], validation=scored)
    return DataArguments(data_dir=str(path), max_length=32, task_kind="sentence-embedding", label_column="score")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_cosines_of_pairs(tmp_path, pairs, model, tokenizer, pooling):
    name = saved(tmp_path / "encoder", model("bert"), tokenizer)
    write_modules(tmp_path / "encoder", pooling)
    task = load_task(pairs)
    assert type(task) is SentenceEmbedding
    answers = found_by(name, task, batch_size=5)
    net = transformers.AutoModel.from_pretrained(name)
    pools = {
        "mean": lambda states: states.mean(0),
        "cls": lambda states: states[0],
        "max": lambda states: states.amax(0),
        "lasttoken": lambda states: states[-1],
    }

    def vector(text):
        with torch.no_grad():
            return pools[pooling](net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]).double()

    rows = task.split("validation")
    cosines = [
        float(torch.nn.functional.cosine_similarity(vector(row["sentence1"]), vector(row["sentence2"]), dim=0))
        for row in rows
    ]
    expected = stats.spearmanr(cosines, rows["label"]).statistic
    assert answers.metrics()["spearman"] == pytest.approx(expected)
    np.testing.assert_allclose(answers.cosines, cosines, rtol=1e-5)


def write_modules(path, pooling):
    (path / "1_Pooling").mkdir()
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    name = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}[pooling]
    settings = {"word_embedding_dimension": 32, f"pooling_mode_{name}": True, "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def test_pooling_that_is_not_known_is_refused(tmp_path, pairs, model, tokenizer):
    name = saved(tmp_path / "encoder", model("bert"), tokenizer)
    write_modules(tmp_path / "encoder", "mean")
    modules = json.loads((tmp_path / "encoder" / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "encoder" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"go through Dense .* not supported"):
        found_by(name, load_task(pairs))


@pytest.fixture
def queries(tmp_path, sentences):
    """Queries with the text that belongs to each; several queries share a text."""
    texts = [t for t, _ in sentences]
    rows = [{"query": texts[i], "passage": f"{texts[i % 9]} {texts[i % 9 + 9]}"} for i in range(40)]
    path = tmp_path / "queries"
    folder(path, train=[{"text": t} for t in texts], validation=rows)
    return DataArguments(data_dir=str(path), max_length=64, task_kind="sentence-embedding")


def test_texts_of_queries_are_found_among_all(tmp_path, queries, model, tokenizer):
    name = saved(tmp_path / "encoder", model("bert"), tokenizer)
    task = load_task(queries)
    assert (task.main_metric, task.measured_split()) == ("recall_at_1", "validation")
    rows = task.split("validation")
    assert len(task.encode("validation", tokenizer, 64)) == len(rows) + len(set(rows["sentence2"][:])) == 49
    answers = found_by(name, task, batch_size=7)
    net = transformers.AutoModel.from_pretrained(name)

    @torch.no_grad()
    def vector(text):
        return net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).double()

    passages = {text: vector(text) for text in rows["sentence2"]}
    ranks = []
    for row in rows:
        query = vector(row["sentence1"])
        near = {text: float(torch.cosine_similarity(query, found, dim=0)) for text, found in passages.items()}
        ranks.append(sorted(near, key=near.get, reverse=True).index(row["sentence2"]))
    assert answers.ranks.tolist() == ranks
    assert len(set(ranks)) > 3
    assert answers.metrics() == {
        "recall_at_1": pytest.approx(ranks.count(0) / 40),
        "recall_at_10": pytest.approx(sum(rank < 10 for rank in ranks) / 40),
        "mrr": pytest.approx(sum(1 / (1 + rank) for rank in ranks) / 40),
    }
    assert answers.at(np.array([0, 0, 3])).ranks.tolist() == [ranks[0], ranks[0], ranks[3]]
    with pytest.raises(ValueError, match="no pairs to measure on"):
        task.measured_split("train")


def test_many_queries_are_ranked_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    queries, texts = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (
        generator.standard_normal((23, 4)), generator.standard_normal((11, 4))
    ))  # fmt: skip
    wanted = generator.integers(11, size=23)
    whole = ranks_of(queries, texts, wanted)
    monkeypatch.setattr("hf_compress.tasks.retrieval._QUERIES", 4)
    assert ranks_of(queries, texts, wanted).tolist() == whole.tolist()


def test_texts_alone_cannot_be_measured(tmp_path, pairs):
    task = load_task(pairs)
    assert task.measured_split() == "validation"
    with pytest.raises(ValueError, match="no pairs to measure on"):
        task.measured_split("train")


# What decides the kind


def test_the_columns_and_the_model_decide(tmp_path, texts, pairs, model, tokenizer):
    encoder = saved(tmp_path / "encoder", model("bert"), tokenizer)
    writer = saved(tmp_path / "lm", model("opt", "causal_lm"), tokenizer)
    configs = {name: transformers.AutoConfig.from_pretrained(name) for name in (encoder, writer)}
    assert type(load_task(texts, configs[writer])) is LanguageModeling
    assert type(load_task(texts, configs[encoder])) is SentenceEmbedding
    with pytest.raises(ValueError, match="fit language-modeling or sentence-embedding: choose one with --task_kind"):
        load_task(texts)
    classifier = saved(tmp_path / "classifier", model("bert", "sequence_classification"), tokenizer)
    with pytest.raises(ValueError, match="columns text: name the one with the labels by --label_column"):
        load_task(texts, transformers.AutoConfig.from_pretrained(classifier))
    scored = DataArguments(validation_file=str(tmp_path / "pairs" / "validation.jsonl"), label_column="score")
    assert type(load_task(scored, configs[encoder])) is SequenceClassification
    write_modules(tmp_path / "encoder", "mean")
    assert type(load_task(scored, transformers.AutoConfig.from_pretrained(encoder))) is SentenceEmbedding
    scored.task_kind = "regression"
    with pytest.raises(ValueError, match="task_kind must be one of sequence-classification, "):
        load_task(scored)


def test_the_table_names_all_kinds():
    assert sorted(TASK_KINDS) == [
        "image-classification", "language-modeling", "question-answering", "reranking", "sentence-embedding",
        "sequence-classification", "token-classification",
    ]  # fmt: skip
    for name, kind in TASK_KINDS.items():
        assert kind.kind == name
        assert kind.summary


def test_a_bootstrap_of_questions(questions, tokenizer):
    gold = [["a"]] * 50
    right = SpanAnswers(gold, ["a"] * 50)
    half = SpanAnswers(gold, ["a", "b"] * 25)
    assert standard_error(right, half, "exact_match") == pytest.approx(0.5 / math.sqrt(50), rel=0.25)
