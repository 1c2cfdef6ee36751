"""Answers as SQuAD counts them: exact match and F1 of words, after case, punctuation and articles are taken away.

The rules are those of the official evaluation of SQuAD 2.0 (Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822),
which give what SQuAD 1.1's give wherever every question has an answer. Here they are shares in [0, 1].
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
    """What a model says to one question."""

    text: str
    """The best answer that it found in the context."""
    margin: float
    """Score of "no answer" minus score of `text`."""


class _Row(NamedTuple):
    margin: float
    answerable: bool
    exact: bool
    f1: float


class AnswerMetrics:
    """`exact_match` and `f1`, each the best over a question's answers; with "no answer" also for each kind of question.

    The numbers of rows are kept, not sums: which of the answers count depends on `threshold`, that `best_threshold`
    chooses when all rows are known. Sums are exact, so neither order nor batches matter.

    Args:
        answered: Outputs and batch -> what is said to each question.
        threshold: "No answer" is said where the margin is above; None: never.
    """

    smaller_is_better: tuple[str, ...] = ()

    def __init__(
        self, answered: Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[Answered]], threshold: float | None
    ) -> None:
        self.answered = answered
        self.threshold = threshold
        self.rows: list[_Row] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the rows of a batch; `batch["answers"]` has the true answers of each, none where there is none."""
        for said, answers in zip(self.answered(outputs, batch), batch["answers"], strict=True):
            self.add(said, answers)

    def add(self, said: Answered, answers: Sequence[str]) -> None:
        """Adds one question."""
        exact, f1 = answer_scores(said.text, answers)
        self.rows.append(_Row(said.margin, bool(answers), exact, f1))

    def merge(self, other: AnswerMetrics) -> None:
        """Adds the rows of another process."""
        self.rows += other.rows

    def compute(self) -> dict[str, float]:
        """Returns `exact_match` and `f1`; with a threshold also those of answerable and of unanswerable questions."""
        scored = [(row.answerable, *self._score(row, self.threshold)) for row in self.rows]
        out = _means([(exact, f1) for _, exact, f1 in scored])
        if self.threshold is None:
            return out
        with_answer = _means([(exact, f1) for answerable, exact, f1 in scored if answerable])
        without = _means([(exact, f1) for answerable, exact, f1 in scored if not answerable])
        out |= {f"answerable_{name}": value for name, value in with_answer.items()}
        return out | {"unanswerable_accuracy": without["exact_match"]}

    def best_threshold(self) -> float:
        """Returns the threshold with the highest F1 over the rows seen; 0 without rows.

        It lies in the middle between two margins, so that rows near it do not hang on rounding.
        """
        margins = sorted({row.margin for row in self.rows})
        if not margins:
            return 0.0
        between = [(low + high) / 2 for low, high in zip(margins, margins[1:], strict=False)]
        candidates = [margins[0] - 1.0, *between, margins[-1] + 1.0]
        scores = self._f1_by_count(margins)
        best = max(scores)
        return min((candidates[i] for i, score in enumerate(scores) if score == best), key=abs)

    def _f1_by_count(self, margins: list[float]) -> list[float]:
        """Returns the F1 when only the rows of the i lowest margins are answered, for every i."""
        gains: dict[float, list[float]] = {margin: [] for margin in margins}
        for row in self.rows:
            gains[row.margin].append(row.f1 - (not row.answerable))
        total = float(sum(not row.answerable for row in self.rows))
        found = [total]
        for margin in margins:
            total += math.fsum(gains[margin])
            found.append(round(total, 9))  # sums in the order of margins: rounding must not break a tie
        return found

    @staticmethod
    def _score(row: _Row, threshold: float | None) -> tuple[float, float]:
        if threshold is not None and row.margin > threshold:
            return float(not row.answerable), float(not row.answerable)
        return float(row.exact), row.f1


def answer_scores(said: str, answers: Sequence[str]) -> tuple[bool, float]:
    """Returns exact match and F1 of a text against the best of the true answers.

    Args:
        said: The text.
        answers: True answers; those without any word after normalisation do not count, and none means "no answer",
            which is only matched by a text without words.
    """
    words = normalised(said).split()
    true = [found for found in (normalised(answer).split() for answer in answers) if found] or [[]]
    return any(words == each for each in true), max(_f1(words, each) for each in true)


def normalised(text: str) -> str:
    """Returns a text in lower case, without punctuation and English articles, words parted by one blank."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    shared = (Counter(said) & Counter(true)).total()
    return 2 * shared / (len(said) + len(true))


def _means(scores: list[tuple[float, float]]) -> dict[str, float]:
    count = max(len(scores), 1)
    return {
        "exact_match": math.fsum(exact for exact, _ in scores) / count,
        "f1": math.fsum(f1 for _, f1 in scores) / count,
    }
