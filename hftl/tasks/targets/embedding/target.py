"""What pairs of texts teach: their scores, or that they belong together."""

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
"""What cosines of texts are multiplied by before a softmax, as is usual (sentence-transformers)."""


class ScoredPairsTarget:
    """How alike the texts of each pair are.

    Args:
        column: The score column.
        low: Score that stands for 0.
        high: Score that stands for 1.
        pair_loss: `cosine`: the squared difference of cosine and score (Reimers and Gurevych 2019,
            https://arxiv.org/abs/1908.10084, section 3). `cosent`: the order of scores alone counts.
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
        """Returns no head: the network itself learns."""
        return HeadSpec(model_class, 0, problem_type=None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns scores [B] with `low` as 0 and `high` as 1, or None where rows have none."""
        scores = [example.get(self.column) for example in examples]
        if any(score is None for score in scores):
            return None
        return (torch.tensor(scores, dtype=torch.float64) - self.low).div(self.high - self.low).float()

    def loss(self, outputs: Outputs, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each pair [B]."""
        cosines = (outputs["embedding"].float() * outputs["pair_embedding"].float()).sum(-1)
        return cosent(cosines, labels, SCALE, weight) if self.pair_loss == "cosent" else (cosines - labels).square()

    def metrics(self) -> list[Metric]:
        """Returns Spearman's and Pearson's correlation."""
        return [SimilarityCorrelation()]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the cosine of each pair, or the embedding where a row has one text."""
        return _decoded(outputs)

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a score, or with one that is no finite number."""
        return {split: self.unusable(rows) for split, rows in splits.items()}

    def unusable(self, rows: Dataset) -> dict[int, BadRow]:
        """Returns the rows of one split, as `invalid_rows`."""
        return {row: BadRow("no score", self.column) for row in _without_score(rows, self.column)}

    def state(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"column": self.column, "low": self.low, "high": self.high, "pair_loss": self.pair_loss}


class PositivePairsTarget:
    """Pairs that belong together; every other second text of a batch is a wrong one.

    In-batch negatives with a symmetric cross entropy (Henderson et al. 2017, https://arxiv.org/abs/1705.00652, section
    4.4, there in one direction).

    Args:
        columns: Both text columns: a pair is known by its texts.
    """

    best_metric = "mrr"
    info = TargetInfo("positive pairs")
    depends_on_batch = True

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.problems: list[str] = []

    def head(self, model_class: str) -> HeadSpec:
        """Returns no head: the network itself learns."""
        return HeadSpec(model_class, 0, problem_type=None)

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns what both texts of each pair are [B, 2] int64 (`content_id`), or None where one is missing."""
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
        """Returns the cosine of each pair, or the embedding where a row has one text."""
        return _decoded(outputs)

    def state(self) -> dict[str, Any]:
        """Returns the columns."""
        return {"columns": self.columns}


def find_pair_target(splits: Splits, texts: Sequence[str]) -> ScoredPairsTarget | PositivePairsTarget:
    """Detects the score column and its range, or takes pairs to belong together; what is wrong goes into `problems`.

    Args:
        splits: The data; `data.label_column` names the scores, `train.pair_loss` the loss.
        texts: The text columns.
    """
    features, config = splits["train"].features, splits.config
    others = {name: kind for name, kind in features.items() if name not in texts}
    column = config.label_column or usual_column("score", others)
    wanted = splits.pair_loss
    if column is None:
        found = PositivePairsTarget(texts)
        if wanted not in ("auto", "infonce"):
            found.problems = [
                f"train.pair_loss: '{wanted}' learns from scores, and there is no column of them (looked for "
                f"{', '.join(ROLES['score'].usual_names)}). Say --data.label_column NAME, or infonce for pairs that "
                "belong together."
            ]
        found.problems += _single_rows(splits)
        log("data: no scores (data.label_column): the texts of each row are taken to belong together")
        return found
    if column not in features:
        listed = ", ".join(features)
        found = ScoredPairsTarget(column, 0.0, 1.0, "cosine")
        found.problems = [
            f"data.label_column: there is no column '{column}'.{nearest(column, features)} Columns: {listed}."
        ]
        return found
    return _scores(splits, column, "cosine" if wanted == "auto" else wanted)


def _scores(splits: Splits, column: str, wanted: str) -> ScoredPairsTarget:
    found = ScoredPairsTarget(column, 0.0, 1.0, wanted)
    values, classes = _numbers(splits["train"], column), getattr(splits["train"].features[column], "names", [])
    if values is None or len(classes) > 2:
        what = f"holds the classes {shorten(classes)}" if classes else "does not hold numbers"
        found.problems = [f"data.label_column: '{column}' {what}; a score says how alike the texts of a pair are."]
        return found
    if wanted not in ("cosine", "cosent"):
        found.problems.append(
            f"train.pair_loss: '{wanted}' takes pairs that belong together, but column '{column}' scores them; say "
            "cosine or cosent, or leave out that column and the rows with low scores."
        )
    for split, rows in splits.items() if not splits.lenient else ():
        bad = _without_score(rows, column)
        if bad:
            found.problems.append(
                f"data.source: {split} has {len(bad)} row(s) without a finite score in column '{column}', first at row "
                f"{bad[0]}. Repair them, or leave them out with --data.on_error skip."
            )
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        found.problems.append(
            f"data.label_column: all scores of train in column '{column}' are {low:g}: nothing to learn."
        )
        return found
    found.low, found.high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    log(f"data: scores from column '{column}', {found.low:g} to {found.high:g} (taken as 0 to 1); loss {wanted}")
    return found


def _numbers(rows: Dataset, column: str) -> list[float | None] | None:
    """Returns the values of a column, or None where they are not numbers."""
    values = arrow_column(rows, column).to_pylist()
    numeric = all(value is None or isinstance(value, (bool, int, float)) for value in values)
    return [None if value is None else float(value) for value in values] if numeric else None


def _without_score(rows: Dataset, column: str) -> list[int]:
    values = _numbers(rows, column) if column in rows.features else [None] * len(rows)
    return [row for row, value in enumerate(values or ()) if value is None or not math.isfinite(value)]


def _single_rows(splits: Splits) -> list[str]:
    return [
        f"data.source: {split} has a single pair, and there is nothing to compare it with; two are needed at least."
        for split, rows in splits.items()
        if len(rows) < 2
    ]


def _decoded(outputs: Outputs) -> list[dict[str, Any]]:
    if "pair_embedding" not in outputs:
        return [{"embedding": row} for row in outputs["embedding"].float().tolist()]
    cosines = (outputs["embedding"].double() * outputs["pair_embedding"].double()).sum(-1)
    return [{"similarity": cosine} for cosine in cosines.tolist()]
