"""SQuAD metrics of extractive question answering: exact match and F1 over normalized words.

The rules are those of the official SQuAD 2.0 evaluation (Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822). They
equal those of SQuAD 1.1 if every question has an answer. Values are fractions in [0, 1].
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answered(NamedTuple):
    """Predicted answer to one question.

    Attributes:
        text: Best span of the context.
        margin: Score of "no answer" minus score of `text`.
    """

    text: str
    margin: float


class _Row(NamedTuple):
    margin: float
    answerable: bool
    exact: bool
    f1: float


class AnswerMetrics:
    """`exact_match` and `f1`, each the maximum over the true answers of a question.

    With a threshold, also the metrics of answerable and of unanswerable questions. Values are stored per row, because
    the predictions depend on `threshold`, which `best_threshold` selects from all rows. Sums are exact, so order and
    batches do not change the result.

    Args:
        answered: Function of outputs and batch that returns the predicted answer to each question.
        threshold: Margin above which "no answer" is predicted; None never predicts it.
    """

    smaller_is_better: tuple[str, ...] = ()

    def __init__(
        self, answered: Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[Answered]], threshold: float | None
    ) -> None:
        self.answered = answered
        self.threshold = threshold
        self.rows: list[_Row] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the rows of a batch; `batch["answers"]` has the true answers of each row, [] if unanswerable."""
        for predicted, answers in zip(self.answered(outputs, batch), batch["answers"], strict=True):
            self.add(predicted, answers)

    def add(self, predicted: Answered, answers: Sequence[str]) -> None:
        """Adds one question with its true answers."""
        exact, f1 = answer_scores(predicted.text, answers)
        self.rows.append(_Row(predicted.margin, bool(answers), exact, f1))

    def merge(self, other: AnswerMetrics) -> None:
        """Adds the rows of another process."""
        self.rows += other.rows

    def compute(self) -> dict[str, float]:
        """Returns `exact_match` and `f1`; with a threshold also for answerable and unanswerable questions."""
        scored = [(row.answerable, *self._score(row, self.threshold)) for row in self.rows]
        scores = _means([(exact, f1) for _, exact, f1 in scored])
        if self.threshold is None:
            return scores
        answerable = _means([(exact, f1) for has_answer, exact, f1 in scored if has_answer])
        unanswerable = _means([(exact, f1) for has_answer, exact, f1 in scored if not has_answer])
        scores |= {f"answerable_{name}": value for name, value in answerable.items()}
        return scores | {"unanswerable_accuracy": unanswerable["exact_match"]}

    def best_threshold(self) -> float:
        """Returns the threshold with the highest F1 on the added rows; 0 without rows.

        It is the midpoint between two margins, so rounding does not change predictions.
        """
        margins = sorted({row.margin for row in self.rows})
        if not margins:
            return 0.0
        midpoints = [(low + high) / 2 for low, high in zip(margins, margins[1:], strict=False)]
        candidates = [margins[0] - 1.0, *midpoints, margins[-1] + 1.0]
        scores = self._f1_sums(margins)
        best = max(scores)
        return min((candidates[i] for i, score in enumerate(scores) if score == best), key=abs)

    def _f1_sums(self, margins: list[float]) -> list[float]:
        """Returns the summed F1 if only the rows with the i lowest margins are answered, for every i."""
        gains: dict[float, list[float]] = {margin: [] for margin in margins}
        for row in self.rows:
            gains[row.margin].append(row.f1 - (not row.answerable))
        total = float(sum(not row.answerable for row in self.rows))
        sums = [total]
        for margin in margins:
            total += math.fsum(gains[margin])
            sums.append(round(total, 9))  # rounding keeps ties equal
        return sums

    @staticmethod
    def _score(row: _Row, threshold: float | None) -> tuple[float, float]:
        if threshold is not None and row.margin > threshold:
            return float(not row.answerable), float(not row.answerable)
        return float(row.exact), row.f1


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[bool, float]:
    """Returns exact match and F1 of a prediction, the maximum over the true answers.

    Args:
        prediction: Predicted answer.
        answers: True answers. Answers without words after normalization are ignored. Without answers, only a prediction
            without words is correct.
    """
    words = _normalize(prediction).split()
    true = [answer_words for answer_words in (_normalize(answer).split() for answer in answers) if answer_words] or [[]]
    return any(words == answer_words for answer_words in true), max(_f1(words, answer_words) for answer_words in true)


def _normalize(text: str) -> str:
    """Returns a text in lower case, without punctuation and English articles, words separated by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(predicted: list[str], true: list[str]) -> float:
    if not predicted or not true:
        return float(predicted == true)
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true))


def _means(scores: list[tuple[float, float]]) -> dict[str, float]:
    count = max(len(scores), 1)
    return {
        "exact_match": math.fsum(exact for exact, _ in scores) / count,
        "f1": math.fsum(f1 for _, f1 in scores) / count,
    }
