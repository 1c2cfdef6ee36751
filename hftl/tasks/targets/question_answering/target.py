"""Extractive question answering: cross entropy over the first and the last token of the answer in each window."""

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
from hftl.tasks.targets.question_answering.span_search import NO_SCORE, ContextSpans, find_spans
from hftl.tasks.task import Outputs

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of padding windows."""
NUM_CANDIDATES = 5
"""Number of candidate answers per prediction."""
Answer = tuple[str, int]
"""Text, and index of its first character in the context."""


class QuestionAnsweringTarget:
    """Answer spans in a context, in SQuAD format.

    Args:
        column: The answer column: `{"text": [...], "answer_start": [...]}`, or a list of such records; lists are empty
            for unanswerable questions.
        context: The context column.
        longest: Largest number of tokens of an answer (`data.max_answer_length`).
        null: Whether train has unanswerable questions, so that "no answer" is allowed.
        threshold: Margin of the score of "no answer" over the best answer above which it is predicted; tuned on
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
        """Detects the answer column, validates every answer, and collects errors in `problems`.

        Args:
            splits: All rows.
            context: The context column.
        """
        config = splits.config
        try:
            column = find_column("answers", splits["train"].features, config.label_column)
        except DataError as error:
            target = cls("answers", context)
            target.problems = error.problems
            return target
        target = cls(column.name, context, config.max_answer_length)
        unanswerable: dict[str, int] = {}
        for split, rows in splits.items():
            answers = list(target._read(rows))
            invalid = [(row, read) for row, read in enumerate(answers) if isinstance(read, BadRow)]
            unanswerable[split] = sum(read == [] for read in answers)
            if invalid and not splits.lenient:
                problem = _invalid_rows_problem(split, target.column, invalid)
                target.problems.append(f"{problem} Correct them, or set --data.on_error skip.")
        target.null = unanswerable.get("train", 0) > 0
        if unanswerable.get("train", 0) == len(splits["train"]):
            target.problems.append(
                f"data.label_column: no training question has an answer in column '{column.name}'. Set another column."
            )
        log(f"data: answers from column '{column.name}' ({column.why})")
        counts = ", ".join(f"{split} {count}" for split, count in unanswerable.items() if count)
        if counts and target.null:
            log(f'data: unanswerable questions: {counts}; the threshold of "no answer" is tuned on validation')
        elif counts:
            log(f"data: unanswerable questions: {counts}; train has none, so the model always predicts an answer")
        return target

    def _read(self, rows: Dataset) -> Iterator[list[Answer] | BadRow]:
        """Yields the answers of each row, or the reason why they are invalid."""
        values = arrow_column(rows, self.column).to_pylist() if self.column in rows.features else [None] * len(rows)
        for context, value in zip(arrow_column(rows, self.context).to_pylist(), values, strict=True):
            answers = answers_in(value)
            invalid = BadRow("no answers", self.column) if answers is None else _length_mismatch(value, self.column)
            for text, start in answers or ():
                if not isinstance(text, str) or not text.strip() or context is None:
                    invalid = BadRow("empty answer", self.column)
                elif not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
                    position = context.find(text)
                    kind = "answer not in context" if position < 0 else "answer not at answer_start"
                    fact = f"answer_start is {start}{f', text is at {position}' * (position >= 0)}"
                    invalid = invalid or BadRow(f"{kind}: {fact}", self.column, text)
            yield invalid or answers or []

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose answers are not at their position in the context."""
        return {
            split: {row: read for row, read in enumerate(self._read(rows)) if isinstance(read, BadRow)}
            for split, rows in splits.items()
        }

    def check(self, rows: Dataset) -> None:
        """Checks that all answers are at their position in the context.

        Raises:
            DataError: Some are not.
        """
        invalid = [(row, read) for row, read in enumerate(self._read(rows)) if isinstance(read, BadRow)]
        if invalid and self.column in rows.features:
            raise DataError(_invalid_rows_problem("the dataset", self.column, invalid))

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with two outputs per token: start and end logit of the answer."""
        return HeadSpec(model_class, 2, (), None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns first and last token of the answer in each window [B, W, 2] int64; None without answers.

        The first of several answers is used. Windows without the complete answer have (0, 0), padding windows
        `IGNORED`. If no window contains the complete answer, the window with most of its tokens is labeled.
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
        """Returns the mean cross entropy of first and last token over the windows of each example [B] in float32.

        Args:
            outputs: `logits` [B, W, T, 2].
            labels: First and last token [B, W, 2].
        """
        logits = outputs["logits"].float().transpose(2, 3).flatten(0, 2)
        losses = functional.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(len(labels), -1).sum(1) / (labels != IGNORED).sum((1, 2))

    def metrics(self) -> list[Metric]:
        """Returns exact match and F1 as in SQuAD."""
        threshold = self.threshold if self.null else None
        return [AnswerMetrics(partial(_predicted_answers, longest=self.longest, null=self.null), threshold)]

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Sets the threshold with the highest F1 on the rows of `metrics`, if there are unanswerable questions."""
        if not self.null:
            return
        for metric in metrics:
            if isinstance(metric, AnswerMetrics):
                metric.threshold = self.threshold = metric.best_threshold()
                log(f'evaluate: threshold of "no answer" with the highest F1 on validation: {self.threshold:.2f}')

    def decode(self, outputs: Outputs, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the answer, its position in the context, its probability, and the candidates.

        "No answer" is an empty text at (-1, -1). With true answers, rows also have `label`.
        """
        rows = []
        spans_of_rows = _best_spans(outputs, batch, self.longest, NUM_CANDIDATES, self.null)
        for spans, context in zip(spans_of_rows, batch["contexts"], strict=True):
            candidates = [
                {"answer": context[c.start : c.end], "start": c.start, "end": c.end, "confidence": c.probability}
                for c in spans.candidates
            ]
            no_answer = {"answer": "", "start": -1, "end": -1, "confidence": spans.null_probability}
            is_null = not candidates or self.null and _margin(spans) > self.threshold
            rows.append((no_answer if is_null else candidates[0]) | {"candidates": candidates})
            if self.null:
                rows[-1]["no_answer"] = spans.null_probability
        if "answers" in batch:
            rows = [row | {"label": list(true)} for row, true in zip(rows, batch["answers"], strict=True)]
        return rows

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("column", "context", "longest", "null", "threshold")
        return {name: getattr(self, name) for name in names}


def _length_mismatch(value: Any, column: str) -> BadRow | None:
    if not isinstance(value, Mapping):
        return None
    texts, starts = (len(value[name] or ()) for name in ("text", "answer_start"))
    reason = f"unequal numbers of answers and starts: {texts} text(s), {starts} answer_start(s)"
    return BadRow(reason, column) if texts != starts else None


def answers_in(value: Any) -> list[Answer] | None:
    """Returns text and first character of each answer in a cell; None for a missing cell."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return list(zip(value["text"] or (), value["answer_start"] or (), strict=False))
    return [(answer["text"], answer["answer_start"]) for answer in value]


def _best_spans(
    outputs: Outputs, batch: Mapping[str, Any], max_tokens: int, num_candidates: int, null: bool
) -> list[ContextSpans]:
    return find_spans(outputs["logits"], batch["offsets"], batch["windows"], max_tokens, num_candidates, null)


def _predicted_answers(outputs: Outputs, batch: Mapping[str, Any], longest: int, null: bool) -> list[Answered]:
    spans_of_rows = _best_spans(outputs, batch, longest, 1, null)
    texts = [
        context[spans.candidates[0].start : spans.candidates[0].end] if spans.candidates else ""
        for spans, context in zip(spans_of_rows, batch["contexts"], strict=True)
    ]
    return [Answered(text, _margin(spans)) for text, spans in zip(texts, spans_of_rows, strict=True)]


def _margin(spans: ContextSpans) -> float:
    return spans.null_score - spans.candidates[0].score if spans.candidates else -NO_SCORE


def _answer_tokens(windows: Sequence[Tensor], answer: Answer | None) -> Tensor:
    """Returns first and last token of an answer in each window.

    Args:
        windows: Start and end character of each token [T, 2], for W windows; -1 for tokens outside the context.
        answer: The answer; None for unanswerable questions.

    Returns:
        Token indices [W, 2]; (0, 0) for windows without the answer.
    """
    labels = torch.zeros((len(windows), 2), dtype=torch.int64)
    if answer is None:
        return labels
    start, end = answer[1], answer[1] + len(answer[0].rstrip())
    overlapping = [
        ((offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 0] >= 0)).nonzero().flatten()
        for offsets in windows
    ]
    starts, ends = (
        [
            int(offsets[tokens[side], side]) if len(tokens) else None
            for offsets, tokens in zip(windows, overlapping, strict=True)
        ]
        for side in (0, -1)
    )
    first = min((value for value in starts if value is not None), default=None)
    last = max((value for value in ends if value is not None), default=None)
    is_labeled = [
        window_start is not None and window_start == first and window_end == last
        for window_start, window_end in zip(starts, ends, strict=True)
    ]
    if not any(is_labeled):
        longest = max(range(len(windows)), key=lambda window: len(overlapping[window]))
        is_labeled = [window == longest and len(overlapping[window]) > 0 for window in range(len(windows))]
    for window, tokens in enumerate(overlapping):
        if is_labeled[window]:
            labels[window] = torch.stack([tokens[0], tokens[-1]])
    return labels


def _invalid_rows_problem(split: str, column: str, invalid: Sequence[tuple[int, BadRow]]) -> str:
    first = [f"row {row}: {bad.reason}{f' ({bad.value[:40]!r})' if bad.value else ''}" for row, bad in invalid[:5]]
    return (
        f"data.source: {split} has {len(invalid)} row(s) with invalid answers in column '{column}'; "
        f"{shorten(first, 5)}."
    )
