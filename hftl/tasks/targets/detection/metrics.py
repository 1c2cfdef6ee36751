"""COCO's metrics of object detection, computed by pycocotools from detections that are kept by row number."""

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

MOST = 100
"""Detections of an image that count, those of the highest scores (COCO's maxDets)."""


def pycocotools_problem() -> str | None:
    """Returns a sentence where pycocotools is not installed."""
    if find_spec("pycocotools"):
        return None
    return "object detection is measured with pycocotools, which is not installed: pip install 'hftl[detection]'."


@dataclass(frozen=True)
class _Seen:
    """One image: boxes x0 y0 x1 y1 in its own pixels, of the truth [N, 4] and detected [M, 4], M <= 100."""

    true_boxes: np.ndarray
    true_classes: np.ndarray
    crowd: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


class DetectionMetrics:
    """Average precision and recall as COCO defines them (https://cocodataset.org/#detection-eval).

    Images are kept by row number and evaluated in that order, so neither batches nor processes change a result.

    Args:
        names: Class names, in the order of the outputs.
        detect: Outputs and sizes of images [B, 2] -> `boxes` [Q, 4], `classes` [Q] and `scores` [Q] for each image,
            highest score first.
    """

    def __init__(self, names: Sequence[str], detect: Any) -> None:
        self.names = list(names)
        self.detect = detect
        self.images: dict[int, _Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"detect": None}  # sent to other processes to be merged there

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds a batch with `labels` (`true_boxes` [N, 4], `true_classes` [N], `crowd` [N] in each) and `size`."""
        found = self.detect(outputs, batch["size"])
        for row, (boxes, classes, scores), label in zip(batch["index"].tolist(), found, batch["labels"], strict=True):
            truth = [label[name].cpu().numpy() for name in ("true_boxes", "true_classes", "crowd")]
            detected = [value[:MOST].detach().cpu().numpy() for value in (boxes, classes, scores)]
            self.images[row] = _Seen(*truth, *detected)

    def merge(self, other: DetectionMetrics) -> None:
        """Adds another process's images."""
        self.images |= other.images

    def compute(self) -> dict[str, float]:
        """Returns `ap` (mean over IoU .5:.05:.95 and classes), `ap50`, `ap75`, `ar100`, and `ap/CLASS` for each class.

        Classes without a box are left out of means, as COCO does; where no class has one, the means are NaN.
        """
        precision, recall = self._evaluate()
        found = {
            "ap": _mean(precision),
            "ap50": _mean(precision[0]),
            "ap75": _mean(precision[5]),
            "ar100": _mean(recall),
        }
        by_class = {name: _mean(precision[..., position]) for position, name in enumerate(self.names)}
        return found | {f"ap/{name}": value for name, value in by_class.items() if value == value}

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns precision [T, R, K] and recall [T, K] over IoU thresholds, recall levels and classes; -1: no box."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth: Any = COCO()
        detected: Any = COCO()
        rows = sorted(self.images)
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names)]
        truth.dataset = {"images": [{"id": row} for row in rows], "categories": categories, "annotations": []}
        detected.dataset = truth.dataset | {"annotations": []}
        for row in rows:
            seen = self.images[row]
            truth.dataset["annotations"] += [
                _annotation(row, box, kind) | {"iscrowd": int(crowd)}
                for box, kind, crowd in zip(seen.true_boxes, seen.true_classes, seen.crowd, strict=True)
            ]
            detected.dataset["annotations"] += [
                _annotation(row, box, kind) | {"score": float(score)}
                for box, kind, score in zip(seen.boxes, seen.classes, seen.scores, strict=True)
            ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            for side in (truth, detected):
                for number, annotation in enumerate(side.dataset["annotations"], 1):  # 0 would mean "no match"
                    annotation["id"] = number
                side.createIndex()
            evaluation = COCOeval(truth, detected, "bbox")
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, float("inf")]], ["all"]
            evaluation.params.maxDets = [MOST]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][..., 0, 0], evaluation.eval["recall"][..., 0, 0]


def _annotation(row: int, box: np.ndarray, kind: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box.astype(float).tolist()
    width, height = x1 - x0, y1 - y0
    return {
        "image_id": row,
        "category_id": int(kind),
        "bbox": [x0, y0, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
