"""Boxes with a class each: a set that is predicted at once, and COCO's average precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.data.columns import splits_without
from hftl.data.splits import Splits
from hftl.data.validation import InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.joint_transforms import Places, augment_problems
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.detection.bounding_boxes import (
    ObjectColumn,
    ObjectSurvey,
    categories_of,
    cut_sentences,
    find_objects,
    objects_problems,
    survey_objects,
)
from hftl.tasks.targets.detection.metrics import DetectionMetrics, pycocotools_problem
from hftl.tasks.targets.detection.set_prediction_loss import set_loss
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset

SCORE_FLOOR = 0.3
"""Score below which a detection is no row of predictions. Metrics count all of them."""
_CORNERS = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
"""Centre, width and height @ this = corners x0 y0 x1 y1."""


class DetectionTarget:
    """A list of boxes with classes 0..K-1 for each image; an image may have none.

    Args:
        column: The column of objects.
        names: Class names, in the order of the outputs.
        numbers: What the column holds for each class, where that is a number without a name beside it.
    """

    best_metric = "ap"
    info = TargetInfo("boxes")

    def __init__(self, column: str, names: Sequence[str], numbers: Sequence[int] | None = None) -> None:
        self.column = column
        self.columns = [column]
        self.names = list(names)
        self.numbers = list(numbers) if numbers is not None else None
        self.classes = {value: number for number, value in enumerate(self.numbers or self.names)}
        self.problems: list[str] = []

    @classmethod
    def find(cls, splits: Splits, image: str) -> DetectionTarget:
        """Detects the column of objects and its classes, and reads every box; what is wrong goes into `problems`.

        Args:
            splits: The rows.
            image: The image column: boxes have to lie in their images.
        """
        train = splits["train"]
        try:
            chosen, column = find_objects(train.features, splits.config.label_column)
        except DataError as error:
            return _broken(cls("objects", []), error.problems)
        # a rare category may stand in the validation cut alone
        rows = [splits[split] for split in splits.labelled_by_source]
        counts = sum((Counter(categories_of(part, column)) for part in rows if chosen.name in part.features), Counter())
        values = _in_order(counts, column)
        names = _named(values, splits.class_names)
        found = cls(chosen.name, names, None if names == values else values)
        lacking = splits_without(splits, chosen.name)
        if lacking:
            return _broken(found, lacking)
        empty = [name for name in ("train", "validation") if name in splits and not categories_of(splits[name], column)]
        if empty:
            return _broken(found, [f"data.source: {' and '.join(empty)} has no box in column '{chosen.name}'."])
        missing = pycocotools_problem()
        found.problems = [*([missing] if missing else []), *augment_problems(splits.config.augment)]
        if not splits.lenient and image in train.features:
            for split, seen in found._surveys(splits, image).items():
                found.problems += objects_problems(seen.bad, split)
                for sentence in cut_sentences(seen, split):
                    log(sentence)
        shown = shorten([f"{name} ({counts.get(value, 0)})" for name, value in zip(names, values, strict=True)])
        log(f"data: objects from column '{chosen.name}' ({chosen.why}); {len(names)} classes with boxes: {shown}")
        return found

    def invalid_rows(self, splits: Splits, image: str) -> InvalidRows:
        """Returns the rows with a box that is none, lies outside of its image or has an unknown category."""
        return {split: seen.bad for split, seen in self._surveys(splits, image).items()}

    def _surveys(self, splits: Splits, image: str) -> dict[str, ObjectSurvey]:
        limit = splits.config.max_pixels
        return {
            split: survey_objects(rows, self.reader(rows), image, self.classes, limit)
            for split, rows in splits.items()
            if self.column in rows.features
        }

    def reader(self, rows: Dataset) -> ObjectColumn:
        """Returns how the column is read in these rows: other data may have other fields and numbers."""
        return find_objects(rows.features, self.column)[1]

    def places(self, cell: Any, column: ObjectColumn, size: tuple[int, int]) -> Places:
        """Returns the boxes of an image of height and width `size`, to be moved with it."""
        return Places(boxes=torch.from_numpy(column.read(cell, self.classes, size).boxes).float())

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one class for each name."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), None)

    def labels(self, examples: list[Example]) -> list[dict[str, Tensor]] | None:
        """Returns for each image what is learnt and what is true, or None where rows have no objects.

        Learnt are `class_labels` [N] and `boxes` [N, 4] (centre, width and height in shares of the picture as the model
        sees it), without crowds. True are `true_boxes` [M, 4] (corners in the image's own pixels), `true_classes` [M]
        and `crowd` [M].
        """
        if not all(self.column in example for example in examples):
            return None
        return [self._label(example) for example in examples]

    def _label(self, example: Example) -> dict[str, Tensor]:
        objects = example["column"].read(example[self.column], self.classes, example["size"])
        true_classes, crowd = torch.from_numpy(objects.classes), torch.from_numpy(objects.crowd)
        moved = example["moved"]
        height, width = moved.pixel_values.shape[-2:]
        learnt = ~crowd[moved.kept]
        corners = moved.boxes[learnt] / torch.tensor([width, height, width, height])
        return {
            "class_labels": true_classes[moved.kept][learnt],
            "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
            "true_boxes": torch.from_numpy(objects.boxes).float(),
            "true_classes": true_classes,
            "crowd": crowd,
        }

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns the set loss of each image [B]."""
        return set_loss(outputs, labels, len(self.names))

    def metrics(self) -> Sequence[Metric]:
        """Returns COCO's average precision and recall."""
        return [DetectionMetrics(self.names, self.detections)]

    def detections(self, outputs: Outputs, sizes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns boxes [Q, 4], classes [Q] and scores [Q] of each image, highest score first.

        As transformers' image processors do: of an output per class the Q best pairs of query and class, of a softmax
        with "no object" the best class of each query. Boxes are corners in the image's own pixels, cut off at its
        margins.

        Args:
            outputs: As `set_loss` takes them.
            sizes: Height and width of each image [B, 2].
        """
        logits, count = outputs["logits"].float(), len(self.names)
        corners = outputs["pred_boxes"].float() @ _CORNERS.to(logits.device)
        scale = sizes.to(logits.device).float().flip(1).repeat(1, 2)
        found = []
        for image, boxes, (width, height, *_) in zip(logits, corners * scale[:, None], scale.tolist(), strict=True):
            if image.shape[-1] == count:
                scores, order = image.sigmoid().flatten().sort(descending=True, stable=True)
                scores, order = scores[: len(image)], order[: len(image)]
                query, classes = order // count, order % count
            else:
                scores, classes = image.softmax(-1)[:, :count].max(-1)
                scores, query = scores.sort(descending=True, stable=True)
                classes = classes[query]
            inside = torch.tensor([width, height, width, height], device=boxes.device)
            found.append((torch.minimum(boxes[query].clamp(min=0), inside), classes, scores))
        return found

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns `objects`: label, score and box (corners x0 y0 x1 y1 in pixels) above `SCORE_FLOOR`, best first."""
        rows = []
        for boxes, classes, scores in self.detections(outputs, batch["size"]):
            shown = [
                {"label": self.names[kind], "score": round(score, 4), "box": [round(value, 1) for value in box]}
                for box, kind, score in zip(boxes.tolist(), classes.tolist(), scores.tolist(), strict=True)
                if score >= SCORE_FLOOR
            ]
            rows.append({"objects": shown})
        return rows

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "names": self.names} | ({"numbers": self.numbers} if self.numbers else {})


def _in_order(counts: Mapping[Any, int], column: ObjectColumn) -> list[Any]:
    """Returns the categories in the order of their numbers, or sorted where they have none."""
    return [name for name in column.names if name in counts] if column.names else sorted(counts, key=_natural)


def _natural(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _named(values: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    """Returns the names of categories: numbers have theirs in labels.json, or are their own."""
    if names is not None and all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        return [names[int(value)] for value in values]
    return [str(value) for value in values]


def _broken(found: DetectionTarget, problems: Sequence[str]) -> DetectionTarget:
    found.problems = list(problems)
    return found
