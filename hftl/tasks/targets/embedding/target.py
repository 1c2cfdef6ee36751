"""Targets of text embeddings: similarity scores of pairs, or positive pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.data.columns import arrow_column
from hftl.data.roles import ROLES, usual_column
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import nearest, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.embedding.contrastive_losses import Pairs, content_id, cosent, info_nce
from hftl.tasks.targets.embedding.metrics import SimilarityCorrelation, TextRecall
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset

SCALE = 20.0
"""Inverse temperature of cosines (the default of sentence-transformers)."""


class ScoredPairsTarget:
    """Similarity score of each text pair.

    Args:
        column: The score column.
        low: Score that is mapped to 0.
        high: Score that is mapped to 1.
        pair_loss: `cosine` is the squared difference of cosine and score (Reimers and Gurevych 2019,
            https://arxiv.org/abs/1908.10084, section 3). `cosent` uses only the order of scores.
    """

    best_metric = "spearman"
    info = TargetInfo("scored pairs")

    def __init__(self, column: str, low: float, high: float, pair_loss: str) -> None:
        self.column = column
        self.columns = [column]
        self.low, self.high = low, high
        self.pair_loss = pair_loss
        self.depends_on_batch = pair_loss == "cosent"
        self.problems: list[str] = []

    def head(self, model_class: str) -> HeadSpec:
        """Returns an empty head: the encoder is trained directly."""
        return HeadSpec(model_class, 0, problem_type=None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns scores [B], scaled to 0 at `low` and 1 at `high`, or None if a row has no score."""
        scores = [example.get(self.column) for example in examples]
        if any(score is None for score in scores):
            return None
        return (torch.tensor(scores, dtype=torch.float64) - self.low).div(self.high - self.low).float()

    def loss(self, outputs: Outputs, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each pair [B]."""
        cosines = (outputs["embedding"].float() * outputs["pair_embedding"].float()).sum(-1)
        return cosent(cosines, labels, SCALE, weight) if self.pair_loss == "cosent" else (cosines - labels).square()

    def metrics(self) -> list[Metric]:
        """Returns Spearman and Pearson correlation."""
        return [SimilarityCorrelation()]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the cosine of each pair, or the embedding of rows with one text."""
        return _decode(outputs)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a finite score."""
        return {split: self.unusable(rows) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows of one split without a finite score."""
        return {row: BadRow("no score", self.column) for row in _rows_without_score(rows, self.column)}

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "low": self.low, "high": self.high, "pair_loss": self.pair_loss}


class PositivePairsTarget:
    """Positive pairs; the second texts of other rows of a batch are negatives.

    The loss is the symmetric cross entropy with in-batch negatives.

    Source: Henderson et al. 2017, https://arxiv.org/abs/1705.00652, section 4.4 (there in one direction).

    Args:
        columns: Both text columns; their texts identify a pair.
    """

    best_metric = "mrr"
    info = TargetInfo("positive pairs")
    depends_on_batch = True

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.problems: list[str] = []

    def head(self, model_class: str) -> HeadSpec:
        """Returns an empty head: the encoder is trained directly."""
        return HeadSpec(model_class, 0, problem_type=None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the content ids of both texts of each pair [B, 2] int64, or None if a text is missing."""
        texts = [[example.get(column) for column in self.columns] for example in examples]
        ids = [[content_id(text) for text in pair if isinstance(text, str)] for pair in texts]
        return torch.tensor(ids) if all(len(pair) == 2 for pair in ids) else None

    def loss(self, outputs: Outputs, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each pair [B]."""
        first, second = outputs["embedding"], outputs["pair_embedding"]
        return info_nce(Pairs(first, second, labels[:, 0], labels[:, 1], weight), SCALE)

    def metrics(self) -> list[Metric]:
        """Returns recall@K and mean reciprocal rank."""
        return [TextRecall()]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the cosine of each pair, or the embedding of rows with one text."""
        return _decode(outputs)

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"columns": self.columns}


def find_pair_target(splits: Splits, texts: Sequence[str]) -> ScoredPairsTarget | PositivePairsTarget:
    """Returns a target for scores, or for positive pairs without a score column; collects errors in `problems`.

    Args:
        splits: All rows; `data.label_column` names the score column, `train.pair_loss` the loss.
        texts: The text columns.
    """
    features, config = splits["train"].features, splits.config
    other_columns = {name: kind for name, kind in features.items() if name not in texts}
    column = config.label_column or usual_column("score", other_columns)
    pair_loss = splits.pair_loss
    if column is None:
        target = PositivePairsTarget(texts)
        if pair_loss not in ("auto", "infonce"):
            target.problems = [
                f"train.pair_loss: '{pair_loss}' needs scores, but no column is named "
                f"{', '.join(ROLES['score'].usual_names)}. Set --data.label_column NAME, or --train.pair_loss infonce "
                "for positive pairs."
            ]
        target.problems += _single_pair_problems(splits)
        log("data: no score column; the texts of each row are positive pairs")
        return target
    if column not in features:
        target = ScoredPairsTarget(column, 0.0, 1.0, "cosine")
        target.problems = [
            f"data.label_column: there is no column '{column}'.{nearest(column, features)} "
            f"Columns: {', '.join(features)}."
        ]
        return target
    return _scored_pairs(splits, column, "cosine" if pair_loss == "auto" else pair_loss)


def _scored_pairs(splits: Splits, column: str, pair_loss: str) -> ScoredPairsTarget:
    target = ScoredPairsTarget(column, 0.0, 1.0, pair_loss)
    values, classes = _numbers(splits["train"], column), getattr(splits["train"].features[column], "names", [])
    if values is None or len(classes) > 2:
        fact = f"holds the classes {shorten(classes)}" if classes else "does not hold numbers"
        target.problems = [f"data.label_column: '{column}' {fact}. Set a column of similarity scores."]
        return target
    if pair_loss not in ("cosine", "cosent"):
        target.problems.append(
            f"train.pair_loss: '{pair_loss}' needs positive pairs, but column '{column}' holds scores; allowed: "
            "cosine, cosent. Set one of them, or remove the column and the rows with low scores."
        )
    for split, rows in splits.items() if not splits.lenient else ():
        invalid = _rows_without_score(rows, column)
        if invalid:
            target.problems.append(
                f"data.source: {split} has {len(invalid)} row(s) without a finite score in column '{column}', first at "
                f"row {invalid[0]}. Correct them, or set --data.on_error skip."
            )
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        target.problems.append(
            f"data.label_column: all training scores in column '{column}' are {low:g} and cannot be learned. "
            "Set another column."
        )
        return target
    target.low, target.high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    log(f"data: scores from column '{column}', {target.low:g} to {target.high:g} (scaled to 0..1); loss {pair_loss}")
    return target


def _numbers(rows: Dataset, column: str) -> list[float | None] | None:
    """Returns the values of a column, or None if they are not numbers."""
    values = arrow_column(rows, column).to_pylist()
    is_numeric = all(value is None or isinstance(value, (bool, int, float)) for value in values)
    return [None if value is None else float(value) for value in values] if is_numeric else None


def _rows_without_score(rows: Dataset, column: str) -> list[int]:
    values = _numbers(rows, column) if column in rows.features else [None] * len(rows)
    return [row for row, value in enumerate(values or ()) if value is None or not math.isfinite(value)]


def _single_pair_problems(splits: Splits) -> list[str]:
    return [
        f"data.source: {split} has a single pair, but in-batch negatives need at least two. Add rows."
        for split, rows in splits.items()
        if len(rows) < 2
    ]


def _decode(outputs: Outputs) -> list[dict[str, Any]]:
    if "pair_embedding" not in outputs:
        return [{"embedding": row} for row in outputs["embedding"].float().tolist()]
    cosines = (outputs["embedding"].double() * outputs["pair_embedding"].double()).sum(-1)
    return [{"similarity": cosine} for cosine in cosines.tolist()]
