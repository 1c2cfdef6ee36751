"""Object detection: boxes and classes predicted as a set, measured by COCO's average precision."""

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
    ObjectScan,
    count_categories,
    find_objects,
    log_clipped,
    object_problems,
    scan_objects,
)
from hftl.tasks.targets.detection.metrics import DetectionMetrics, pycocotools_problem
from hftl.tasks.targets.detection.set_prediction_loss import set_loss
from hftl.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from datasets import Dataset

SCORE_FLOOR = 0.3
"""Smallest score of a detection in predictions. Metrics use all detections."""
_CORNERS = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
"""Right factor that converts center, width and height to corners x0 y0 x1 y1."""


class DetectionTarget:
    """Boxes with classes 0..K-1, any number per image.

    Args:
        column: The column of objects.
        names: Class names, in the order of the outputs.
        numbers: Cell value of each class, if the column holds numbers without names.
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
        """Detects the column of objects and its classes, validates every box, and collects errors in `problems`.

        Args:
            splits: All rows.
            image: The image column: boxes have to overlap their images.
        """
        train = splits["train"]
        try:
            chosen, column = find_objects(train.features, splits.config.label_column)
        except DataError as error:
            return _with_problems(cls("objects", []), error.problems)
        # rare categories may occur only in the validation split that hftl split off
        labeled = [splits[split] for split in splits.labelled_by_source]
        counts = sum(
            (Counter(count_categories(rows, column)) for rows in labeled if chosen.name in rows.features), Counter()
        )
        values = _ordered(counts, column)
        names = _class_names(values, splits.class_names)
        target = cls(chosen.name, names, None if names == values else values)
        missing_column = splits_without(splits, chosen.name)
        if missing_column:
            return _with_problems(target, missing_column)
        empty = [
            name for name in ("train", "validation") if name in splits and not count_categories(splits[name], column)
        ]
        if empty:
            problem = f"data.source: {' and '.join(empty)} has no box in column '{chosen.name}'. Add annotated images."
            return _with_problems(target, [problem])
        not_installed = pycocotools_problem()
        target.problems = [*([not_installed] if not_installed else []), *augment_problems(splits.config.augment)]
        if not splits.lenient and image in train.features:
            for split, scan in target._scans(splits, image).items():
                target.problems += object_problems(scan.invalid, split)
                log_clipped(scan, split)
        listed = shorten([f"{name} ({counts.get(value, 0)})" for name, value in zip(names, values, strict=True)])
        log(f"data: objects from column '{chosen.name}' ({chosen.why}); {len(names)} classes (boxes): {listed}")
        return target

    def invalid_rows(self, splits: Splits, image: str) -> InvalidRows:
        """Returns the rows with a box that is invalid, outside its image or of an unknown category."""
        return {split: scan.invalid for split, scan in self._scans(splits, image).items()}

    def _scans(self, splits: Splits, image: str) -> dict[str, ObjectScan]:
        return {
            split: scan_objects(rows, self.reader(rows), image, self.classes, splits.config.max_pixels)
            for split, rows in splits.items()
            if self.column in rows.features
        }

    def reader(self, rows: Dataset) -> ObjectColumn:
        """Returns the format of the column in these rows; fields and category numbers may differ between datasets."""
        return find_objects(rows.features, self.column)[1]

    def places(self, cell: Any, column: ObjectColumn, size: tuple[int, int]) -> Places:
        """Returns the boxes of an image of height and width `size`, for joint transforms."""
        return Places(boxes=torch.from_numpy(column.read(cell, self.classes, size).boxes).float())

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one class per name."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), None)

    def labels(self, examples: list[Example]) -> list[dict[str, Tensor]] | None:
        """Returns training targets and ground truth of each image, or None if rows have no objects.

        Training targets are `class_labels` [N] and `boxes` [N, 4] (center, width and height, normalized by the size of
        the model input), without crowds. Ground truth is `true_boxes` [M, 4] (corners in pixels of the original image),
        `true_classes` [M] and `crowd` [M].
        """
        if not all(self.column in example for example in examples):
            return None
        return [self._label(example) for example in examples]

    def _label(self, example: Example) -> dict[str, Tensor]:
        objects = example["column"].read(example[self.column], self.classes, example["size"])
        true_classes, crowd = torch.from_numpy(objects.classes), torch.from_numpy(objects.crowd)
        moved = example["moved"]
        height, width = moved.pixel_values.shape[-2:]
        trained = ~crowd[moved.kept]
        corners = moved.boxes[trained] / torch.tensor([width, height, width, height])
        return {
            "class_labels": true_classes[moved.kept][trained],
            "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
            "true_boxes": torch.from_numpy(objects.boxes).float(),
            "true_classes": true_classes,
            "crowd": crowd,
        }

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns the set prediction loss of each image [B]."""
        return set_loss(outputs, labels, len(self.names))

    def metrics(self) -> Sequence[Metric]:
        """Returns COCO's average precision and recall."""
        return [DetectionMetrics(self.names, self.detections)]

    def detections(self, outputs: Outputs, sizes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns boxes [Q, 4], classes [Q] and scores [Q] of each image, highest score first.

        Post-processing follows transformers' image processors: the Q best pairs of query and class for K outputs, the
        best class of each query for K + 1 outputs (with "no object"). Boxes are corners in pixels of the original
        image, clipped to it.

        Args:
            outputs: Model outputs (see `set_loss`).
            sizes: Height and width of each image [B, 2].
        """
        logits, count = outputs["logits"].float(), len(self.names)
        corners = outputs["pred_boxes"].float() @ _CORNERS.to(logits.device)
        scale = sizes.to(logits.device).float().flip(1).repeat(1, 2)
        detections = []
        for image, boxes, (width, height, *_) in zip(logits, corners * scale[:, None], scale.tolist(), strict=True):
            if image.shape[-1] == count:
                scores, order = image.sigmoid().flatten().sort(descending=True, stable=True)
                scores, order = scores[: len(image)], order[: len(image)]
                query, classes = order // count, order % count
            else:
                scores, classes = image.softmax(-1)[:, :count].max(-1)
                scores, query = scores.sort(descending=True, stable=True)
                classes = classes[query]
            limits = torch.tensor([width, height, width, height], device=boxes.device)
            detections.append((torch.minimum(boxes[query].clamp(min=0), limits), classes, scores))
        return detections

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns `objects`: label, score and box (corners x0 y0 x1 y1 in pixels), highest score first.

        Detections below `SCORE_FLOOR` are skipped.
        """
        rows = []
        for boxes, classes, scores in self.detections(outputs, batch["size"]):
            objects = [
                {"label": self.names[index], "score": round(score, 4), "box": [round(value, 1) for value in box]}
                for box, index, score in zip(boxes.tolist(), classes.tolist(), scores.tolist(), strict=True)
                if score >= SCORE_FLOOR
            ]
            rows.append({"objects": objects})
        return rows

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"column": self.column, "names": self.names} | ({"numbers": self.numbers} if self.numbers else {})


def _ordered(counts: Mapping[Any, int], column: ObjectColumn) -> list[Any]:
    """Returns the categories in the order of their numbers, or sorted if they have no numbers."""
    if column.names:
        return [name for name in column.names if name in counts]
    return sorted(counts, key=lambda value: (isinstance(value, str), value))


def _class_names(values: Sequence[Any], file_names: Sequence[str] | None) -> list[str]:
    """Returns the names of categories: of numbers those in labels.json, if it has them, else the values."""
    if file_names is not None and all(isinstance(value, int) and 0 <= value < len(file_names) for value in values):
        return [file_names[int(value)] for value in values]
    return [str(value) for value in values]


def _with_problems(target: DetectionTarget, problems: Sequence[str]) -> DetectionTarget:
    target.problems = list(problems)
    return target
