"""Questions whose answers are spans of a text, as in SQuAD.

Letters: S tokens.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from hf_compress.core.batches import live_tokens
from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.column_choice import chosen_column, find_column, read_texts, require_columns
from hf_compress.tasks.inputs import tokenizer_for
from hf_compress.tasks.metrics import Array
from hf_compress.tasks.task import Batch, Collator, Processor, Task, drawn


# Longer answers are rare, and long spans with high scores at both ends are mistakes.
_LONGEST_ANSWER = 30
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_COLUMNS = {"text": Value("string"), "question": Value("string"), "answers": List(Value("string"))}


@dataclass(frozen=True)
class SpanAnswers(Answers):
    """The texts that a model answered.

    Args:
        gold: For each question, the right answers; none where the text does not hold the answer.
        found: The answers; empty for "no answer".
    """

    gold: Sequence[Sequence[str]]
    found: Sequence[str]

    def __len__(self) -> int:
        return len(self.gold)

    def metrics(self) -> dict[str, float]:
        """The fractions (0..1) of exact matches and of words in common (F1), against the nearest right answer."""
        exact = [_best(_matches, found, gold) for found, gold in zip(self.found, self.gold, strict=True)]
        f1 = [_best(_words_in_common, found, gold) for found, gold in zip(self.found, self.gold, strict=True)]
        return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}

    def at(self, examples: npt.NDArray[np.int64]) -> SpanAnswers:
        return SpanAnswers([self.gold[i] for i in examples], [self.found[i] for i in examples])

    def right(self) -> npt.NDArray[np.bool_]:
        pairs = zip(self.found, self.gold, strict=True)
        return np.array([_best(_matches, found, gold) == 1 for found, gold in pairs], dtype=bool)

    def describe(self, example: int) -> tuple[str, str]:
        return next(iter(self.gold[example]), "") or "no answer", self.found[example] or "no answer"


def normalized(text: str) -> str:
    """An answer in lower case without punctuation, articles and surplus spaces, as SQuAD compares them.

    Example:
        >>> normalized("The  Broncos!")
        'broncos'
    """
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _best(measure: Any, found: str, gold: Sequence[str]) -> float:
    return max(float(measure(normalized(found), normalized(right))) for right in gold or [""])


def _matches(found: str, right: str) -> bool:
    return found == right


def _words_in_common(found: str, right: str) -> float:
    ours, theirs = found.split(), right.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Columns `text`, `question`, `answers` (texts) and `starts` (the characters where they begin).

    Args:
        stride: Tokens of a long text that two neighbouring windows share.
        unanswerable: Whether some texts do not hold the answer.
    """

    stride: int
    unanswerable: bool = False

    kind: ClassVar[str] = "question-answering"
    summary: ClassVar[str] = "the part of a text that answers a question"
    model_noun: ClassVar[str] = "question answering model"
    model_class: ClassVar[type[Any]] = AutoModelForQuestionAnswering
    heads: ClassVar[tuple[str, ...]] = ("ForQuestionAnswering",)
    # An answer may lie in any of several windows.
    judged_in_training: ClassVar[bool] = False

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there are questions, texts and answers."""
        answers = "answers" in table.columns or "answer_texts" in table.columns
        return answers and find_column(table, args.text_pair_column, ("question",)) is not None

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> QuestionAnswering:
        """Read texts, questions and answers of all splits."""
        some = next(iter(tables.values()))
        text = chosen_column(some, args.text_column, "text_column", "texts", ("context", "text"))
        question = chosen_column(some, args.text_pair_column, "text_pair_column", "questions", ("question",))
        splits = DatasetDict()
        for split, table in tables.items():
            require_columns(table, (text, question))
            texts = read_texts(table, (text, question))
            answers, starts = _answers(table, texts[text])
            columns = {"text": texts[text], "question": texts[question], "answers": answers, "starts": starts}
            features = Features({**_COLUMNS, "starts": List(Value("int64"))})
            splits[split] = Dataset.from_dict(columns, features=features, split=split)
        return cls(
            name=name,
            splits=drawn(splits, args),
            files={split: table.where for split, table in tables.items()},
            stride=args.window_stride if args.window_stride is not None else args.longest // 3,
            unanswerable=any(not found for rows in splits.values() for found in rows["answers"]),
        )

    @property
    def main_metric(self) -> str:
        """F1 of the words that answers have in common."""
        return "f1"

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Windows of question and text, with the first and last token of the answer.

        Further columns say which example a window is of (`example`) and which characters of the text its tokens are
        (`spans`, -1 elsewhere). Where a window does not hold the answer, both positions are 0.
        """
        rows, tokenizer = self.split(split), tokenizer_for(processor, max_length)
        if tokenizer.padding_side != "right":
            raise ValueError(
                "Question answering needs a tokenizer that pads on the right: positions count from there."
            )

        def windows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            inputs = tokenizer(
                batch["question"], batch["text"], truncation="only_second", max_length=max_length, stride=self.stride,
                return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            source, offsets = inputs.pop("overflow_to_sample_mapping"), inputs.pop("offset_mapping")
            found: dict[str, list[Any]] = {"example": [], "spans": [], "start_positions": [], "end_positions": []}
            for window, example in enumerate(source):
                inside = [part == 1 for part in inputs.sequence_ids(window)]
                spans = [list(span) if text else [-1, -1] for span, text in zip(offsets[window], inside, strict=True)]
                first, last = _positions(spans, batch["starts"][example], batch["answers"][example])
                for column, value in zip(found, (indices[example], spans, first, last), strict=True):
                    found[column].append(value)
            return {**inputs, **found}

        try:
            return rows.map(
                windows, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
            )
        except Exception as error:
            # tokenizers raises what Rust panics with.
            if "truncat" not in str(error).lower() and "stride" not in str(error).lower():
                raise
            raise ValueError(
                f"max_length={max_length} leaves no room for the text beside the longest question with a stride of "
                f"{self.stride} tokens: raise it, or lower window_stride."
            ) from error

    def text_of(self, split: str, example: int) -> str:
        """The question."""
        return str(self.split(split)[example]["question"])

    def collator(self, processor: Processor) -> Collator:
        """Pads to the longest row."""
        return DataCollatorWithPadding(tokenizer_for(processor))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[2, S] the scores that the answer starts and ends at each token, without padding."""
        scores = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        return [both[:, live] for both, live in zip(scores, live_tokens(batch), strict=True)]

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> SpanAnswers:
        """The best span of each example over all its windows."""
        examples = self.split(split)
        best: dict[int, tuple[float, str]] = {}
        empty: dict[int, float] = {}
        texts = examples["text"][:]
        for example, spans, scores in zip(rows["example"], rows["spans"], outputs, strict=True):
            score, (start, end) = best_span(scores, np.array(spans))
            if score > best.get(example, (-np.inf, ""))[0]:
                best[example] = score, texts[example][start:end]
            # The first token stands for "no answer here"; it must hold in every window.
            empty[example] = min(empty.get(example, np.inf), float(scores[:, 0].sum()))
        found = [
            "" if self.unanswerable and empty[example] > best[example][0] else best[example][1]
            for example in range(len(examples))
        ]
        return SpanAnswers(examples["answers"][:], found)


def best_span(scores: Array, spans: Array) -> tuple[float, tuple[int, int]]:
    """The likeliest answer in a window.

    Args:
        scores: [2, S] for first and last token.
        spans: [S, 2] the characters of each token, -1 for tokens that are not of the text.

    Returns:
        The sum of both scores, and the first and one past the last character.
    """
    inside = np.flatnonzero(spans[:, 0] >= 0)
    if not len(inside):
        return -np.inf, (0, 0)
    sums = scores[0, inside][:, None] + scores[1, inside][None, :]
    length = inside[None, :] - inside[:, None]
    sums = np.where((length >= 0) & (length < _LONGEST_ANSWER), sums, -np.inf)
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[first, last]), (int(spans[inside[first], 0]), int(spans[inside[last], 1]))


def _positions(spans: Sequence[Sequence[int]], starts: Sequence[int], answers: Sequence[str]) -> tuple[int, int]:
    """The first and last token of the first answer; (0, 0) where a window does not hold all of it."""
    if not answers:
        return 0, 0
    begin, end = starts[0], starts[0] + len(answers[0])
    touched = [place for place, (a, b) in enumerate(spans) if a >= 0 and a < end and b > begin]
    if not touched or spans[touched[0]][0] > begin or spans[touched[-1]][1] < end:
        return 0, 0
    return touched[0], touched[-1]


def _answers(table: Table, texts: Sequence[str]) -> tuple[list[list[str]], list[list[int]]]:
    """The answers and where they begin, from a column of SQuAD's form or from two columns of lists."""
    pairs: list[tuple[Any, Any]]
    if "answers" in table.columns:
        cells = table.read("answers")
        cells = [cell if isinstance(cell, dict) else {} for cell in cells]
        pairs = [(cell.get("text"), cell.get("answer_start")) for cell in cells]
    else:
        require_columns(table, ("answer_texts", "answer_starts"))
        pairs = list(zip(table.read("answer_texts"), table.read("answer_starts"), strict=True))
    for row, (pair, text) in enumerate(zip(pairs, texts, strict=True), 1):
        if not all(isinstance(part, list | tuple) for part in pair) or len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"{table.where}: row {row} needs its answers as lists of texts and of starts of one length, as in "
                f"{{'text': ['Paris'], 'answer_start': [17]}}."
            )
        for answer, start in zip(*pair, strict=True):
            if (
                not isinstance(answer, str)
                or not isinstance(start, int)
                or text[start : start + len(answer)] != answer
            ):
                raise ValueError(
                    f"{table.where}: row {row} has the answer {answer!r}, which does not begin at character {start} "
                    "of its text."
                )
    return [list(found) for found, _ in pairs], [list(starts) for _, starts in pairs]
