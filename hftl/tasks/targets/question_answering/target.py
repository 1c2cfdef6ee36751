"""An answer as a part of its context: two softmaxes over the tokens of each window, for its first and its last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hftl.data.columns import arrow_column, find_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.sliding_windows import OFFSETS
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.question_answering.metrics import Answered, AnswerMetrics
from hftl.tasks.targets.question_answering.span_search import NO_SCORE, Found, find_spans
from hftl.tasks.task import Outputs

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""What a label is where a row has no such window."""
CANDIDATES = 5
"""Answers that a prediction lists."""
Answer = tuple[str, int]
"""Text, and its first character in the context."""


class QuestionAnsweringTarget:
    """Answers that stand in a context, as SQuAD has them.

    Args:
        column: The column of answers: `{"text": [...], "answer_start": [...]}`, or a list of such pairs; empty lists
            say that there is no answer.
        context: The column of contexts.
        longest: As `data.max_answer_length`.
        null: Whether there are questions without an answer, so that none may be given.
        threshold: "No answer" is given where its score is higher than an answer's by more than this; chosen on
            validation (`tune_thresholds`).
    """

    best_metric = "f1"
    info = TargetInfo("answer spans")

    def __init__(
        self, column: str, context: str, longest: int = 30, null: bool = False, threshold: float = 0.0
    ) -> None:
        self.column = column
        self.columns = [column]
        self.context = context
        self.longest = longest
        self.null = null
        self.threshold = threshold
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits, context: str) -> QuestionAnsweringTarget:
        """Detects the column and looks whether answers stand where they say; what is wrong goes into `problems`.

        Args:
            splits: All rows.
            context: The column of contexts.
        """
        config = splits.config
        try:
            column = find_column("answers", splits["train"].features, config.label_column)
        except DataError as error:
            found = cls("answers", context)
            found.problems = error.problems
            return found
        found = cls(column.name, context, config.max_answer_length)
        without: dict[str, int] = {}
        for split, rows in splits.items():
            read = list(found._read(rows))
            bad = [(row, why) for row, why in enumerate(read) if isinstance(why, BadRow)]
            without[split] = sum(answers == [] for answers in read)
            if bad and not splits.lenient:
                found.problems.append(_bad_sentence(split, found.column, bad))
        found.null = without.get("train", 0) > 0
        if without.get("train", 0) == len(splits["train"]):
            found.problems.append(f"data.label_column: no question of train has an answer in column '{column.name}'.")
        log(f"data: answers from column '{column.name}' ({column.why})")
        found._say_unanswerable(without)
        return found

    def _say_unanswerable(self, without: Mapping[str, int]) -> None:
        counts = ", ".join(f"{split} {count}" for split, count in without.items() if count)
        if counts and self.null:
            log(f"data: questions without an answer: {counts}; validation chooses when none is given")
        elif counts:
            log(f"data: questions without an answer: {counts}; train has none, so the model will always give one")

    def _read(self, rows: Dataset) -> Iterator[list[Answer] | BadRow]:
        """Yields the answers of each row, or why they cannot be used."""
        values = arrow_column(rows, self.column).to_pylist() if self.column in rows.features else [None] * len(rows)
        for context, value in zip(arrow_column(rows, self.context).to_pylist(), values, strict=True):
            answers = answers_in(value)
            wrong = BadRow("no answers", self.column) if answers is None else _uneven(value, self.column)
            for text, start in answers or ():
                if not isinstance(text, str) or not text.strip() or context is None:
                    wrong = BadRow("empty answer", self.column)
                elif not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
                    here = context.find(text)
                    kind = "answer not in context" if here < 0 else "answer not at answer_start"
                    wrong = wrong or BadRow(
                        f"{kind}: says {start}{f', stands at {here}' * (here >= 0)}", self.column, text
                    )
            yield wrong or answers or []

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose answers do not stand in the context where they say."""
        return {
            split: {row: read for row, read in enumerate(self._read(rows)) if isinstance(read, BadRow)}
            for split, rows in splits.items()
        }

    def check(self, rows: Dataset) -> None:
        """Raises DataError where answers do not stand in the context where they say."""
        bad = [(row, read) for row, read in enumerate(self._read(rows)) if isinstance(read, BadRow)]
        if bad and self.column in rows.features:
            raise DataError(_bad_sentence("the data", self.column, bad))

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with two outputs a token: the logits of being the first and the last of the answer."""
        return HeadSpec(model_class, 2, (), None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns first and last token of the answer in each window [B, W, 2] int64; None without answers.

        The first of several answers is learnt. It is (0, 0) in windows that do not have all of it, and `IGNORED` where
        a row has fewer windows. An answer that no window holds whole is learnt where most of it stands.
        """
        if any(example.get(self.column) is None for example in examples):
            return None
        labels = torch.full((len(examples), max(len(example[OFFSETS]) for example in examples), 2), IGNORED)
        for row, example in enumerate(examples):
            answers = answers_in(example[self.column]) or []
            windows = [torch.tensor(window).view(-1, 2) for window in example[OFFSETS]]
            labels[row, : len(windows)] = _answer_tokens(windows, answers[0] if answers else None)
        return labels

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the mean cross entropy of first and last token over the windows of each example [B], in float32.

        Args:
            outputs: `logits` [B, W, T, 2].
            labels: First and last token [B, W, 2].
        """
        logits = outputs["logits"].float().transpose(2, 3).flatten(0, 2)
        losses = functional.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(len(labels), -1).sum(1) / (labels != IGNORED).sum((1, 2))

    def metrics(self) -> list[Metric]:
        """Returns exact match and F1 by SQuAD's rules."""
        threshold = self.threshold if self.null else None
        return [AnswerMetrics(partial(_answered, longest=self.longest, null=self.null), threshold)]

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Chooses the threshold with the best F1, where there are questions without an answer."""
        if not self.null:
            return
        for metric in metrics:
            if isinstance(metric, AnswerMetrics):
                metric.threshold = self.threshold = metric.best_threshold()
                log(f"evaluate: no answer is given where its score is higher by {self.threshold:.2f} (on validation)")

    def decode(self, outputs: Outputs, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the answer, where it stands in the context, its share of all spans' exponential scores, and others.

        No answer is an empty text at (-1, -1); with true answers these are `label`.
        """
        rows = []
        found_in = find_batch(outputs, batch, self.longest, CANDIDATES, self.null)
        for found, context in zip(found_in, batch["contexts"], strict=True):
            listed = [
                {"answer": context[c.start : c.end], "start": c.start, "end": c.end, "confidence": c.share}
                for c in found.candidates
            ]
            none = {"answer": "", "start": -1, "end": -1, "confidence": found.null_share}
            says_nothing = not listed or self.null and _margin(found) > self.threshold
            rows.append((none if says_nothing else listed[0]) | {"candidates": listed})
            if self.null:
                rows[-1]["no_answer"] = found.null_share
        if "answers" in batch:
            rows = [row | {"label": list(true)} for row, true in zip(rows, batch["answers"], strict=True)]
        return rows

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("column", "context", "longest", "null", "threshold")
        return {name: getattr(self, name) for name in names}


def _uneven(value: Any, column: str) -> BadRow | None:
    if not isinstance(value, Mapping):
        return None
    texts, starts = (len(value[name] or ()) for name in ("text", "answer_start"))
    said = f"answers and their starts differ in number: {texts} text(s), {starts} answer_start(s)"
    return BadRow(said, column) if texts != starts else None


def answers_in(value: Any) -> list[Answer] | None:
    """Returns text and first character of each answer; None where nothing is said of answers."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return list(zip(value["text"] or (), value["answer_start"] or (), strict=False))
    return [(each["text"], each["answer_start"]) for each in value]


def find_batch(outputs: Outputs, batch: Mapping[str, Any], longest: int, most: int, null: bool) -> list[Found]:
    """Returns what is found in each context of a batch; see `find_spans`."""
    return find_spans(outputs["logits"], batch["offsets"], batch["windows"], longest, most, null)


def _answered(outputs: Outputs, batch: Mapping[str, Any], longest: int, null: bool) -> list[Answered]:
    found_in = find_batch(outputs, batch, longest, 1, null)
    texts = [
        context[found.candidates[0].start : found.candidates[0].end] if found.candidates else ""
        for found, context in zip(found_in, batch["contexts"], strict=True)
    ]
    return [Answered(text, _margin(found)) for text, found in zip(texts, found_in, strict=True)]


def _margin(found: Found) -> float:
    return found.null_score - found.candidates[0].score if found.candidates else -NO_SCORE


def _answer_tokens(windows: Sequence[Tensor], answer: Answer | None) -> Tensor:
    """Returns first and last token of an answer in each window [W, 2]; (0, 0) where it is not there."""
    found = torch.zeros((len(windows), 2), dtype=torch.int64)
    if answer is None:
        return found
    start, end = answer[1], answer[1] + len(answer[0].rstrip())
    touched = [((each[:, 1] > start) & (each[:, 0] < end) & (each[:, 0] >= 0)).nonzero().flatten() for each in windows]
    begins, stops = (
        [
            int(each[tokens[place], place]) if len(tokens) else None
            for each, tokens in zip(windows, touched, strict=True)
        ]
        for place in (0, -1)
    )
    first = min((begin for begin in begins if begin is not None), default=None)
    last = max((stop for stop in stops if stop is not None), default=None)
    whole = [begin is not None and begin == first and stop == last for begin, stop in zip(begins, stops, strict=True)]
    if not any(whole):
        most = max(range(len(windows)), key=lambda number: len(touched[number]))
        whole = [number == most and len(touched[number]) > 0 for number in range(len(windows))]
    for number, tokens in enumerate(touched):
        if whole[number]:
            found[number] = torch.stack([tokens[0], tokens[-1]])
    return found


def _bad_sentence(split: str, column: str, bad: Sequence[tuple[int, BadRow]]) -> str:
    first = [f"row {row}: {why.reason}{f' ({why.value[:40]!r})' if why.value else ''}" for row, why in bad[:5]]
    return f"data.source: {split} column '{column}' has {len(bad)} row(s) that cannot be used; {shorten(first, 5)}."
