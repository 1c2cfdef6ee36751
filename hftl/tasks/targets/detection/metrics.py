"""COCO metrics of object detection, computed by pycocotools from detections stored by row number."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_DETECTIONS = 100
"""Number of detections per image that are evaluated, highest scores first (COCO's maxDets)."""


def pycocotools_problem() -> str | None:
    """Returns an error message if pycocotools is not installed."""
    if find_spec("pycocotools"):
        return None
    return "task: object detection metrics need pycocotools, which is not installed. Run pip install 'hftl[detection]'."


@dataclass(frozen=True)
class _ImageBoxes:
    """True boxes [N, 4] and detections [M, 4] of one image, M <= 100; corners x0 y0 x1 y1 in its own pixels."""

    true_boxes: np.ndarray
    true_classes: np.ndarray
    crowd: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


class DetectionMetrics:
    """Average precision and recall as COCO defines them (https://cocodataset.org/#detection-eval).

    Images are stored by row number and evaluated in that order, so batches and processes do not change the result.

    Args:
        names: Class names, in the order of the outputs.
        detect: Function of outputs and image sizes [B, 2] that returns boxes [Q, 4], classes [Q] and scores [Q] of each
            image, highest score first.
    """

    def __init__(self, names: Sequence[str], detect: Any) -> None:
        self.names = list(names)
        self.detect = detect
        self.images: dict[int, _ImageBoxes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"detect": None}  # merging in another process needs the images only

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds a batch with `labels` (`true_boxes` [N, 4], `true_classes` [N], `crowd` [N] in each) and `size`."""
        detections = self.detect(outputs, batch["size"])
        for row, detected, label in zip(batch["index"].tolist(), detections, batch["labels"], strict=True):
            true = [label[name].cpu().numpy() for name in ("true_boxes", "true_classes", "crowd")]
            predicted = [value[:MAX_DETECTIONS].detach().cpu().numpy() for value in detected]
            self.images[row] = _ImageBoxes(*true, *predicted)

    def merge(self, other: DetectionMetrics) -> None:
        """Adds the images of another process."""
        self.images |= other.images

    def compute(self) -> dict[str, float]:
        """Returns `ap` (mean over IoU .5:.05:.95 and classes), `ap50`, `ap75`, `ar100`, and `ap/CLASS` of each class.

        Means skip classes without true boxes, as COCO does; they are NaN if no class has a box.
        """
        precision, recall = self._evaluate()
        scores = {
            "ap": _mean(precision),
            "ap50": _mean(precision[0]),
            "ap75": _mean(precision[5]),
            "ar100": _mean(recall),
        }
        per_class = {name: _mean(precision[..., index]) for index, name in enumerate(self.names)}
        return scores | {f"ap/{name}": value for name, value in per_class.items() if value == value}

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns precision [T, R, K] and recall [T, K] of T IoU thresholds, R recall levels, K classes; -1: no box."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth: Any = COCO()
        detected: Any = COCO()
        rows = sorted(self.images)
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names)]
        truth.dataset = {"images": [{"id": row} for row in rows], "categories": categories, "annotations": []}
        detected.dataset = truth.dataset | {"annotations": []}
        for row in rows:
            image = self.images[row]
            truth.dataset["annotations"] += [
                _annotation(row, box, category) | {"iscrowd": int(crowd)}
                for box, category, crowd in zip(image.true_boxes, image.true_classes, image.crowd, strict=True)
            ]
            detected.dataset["annotations"] += [
                _annotation(row, box, category) | {"score": float(score)}
                for box, category, score in zip(image.boxes, image.classes, image.scores, strict=True)
            ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
            for coco in (truth, detected):
                for number, annotation in enumerate(coco.dataset["annotations"], 1):  # id 0 means "no match"
                    annotation["id"] = number
                coco.createIndex()
            evaluation = COCOeval(truth, detected, "bbox")
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, float("inf")]], ["all"]
            evaluation.params.maxDets = [MAX_DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][..., 0, 0], evaluation.eval["recall"][..., 0, 0]


def _annotation(row: int, box: np.ndarray, category: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box.astype(float).tolist()
    width, height = x1 - x0, y1 - y0
    return {
        "image_id": row,
        "category_id": int(category),
        "bbox": [x0, y0, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")
