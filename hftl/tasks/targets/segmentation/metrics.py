"""Metrics of semantic segmentation from one confusion matrix of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class SegmentationMetrics:
    """IoU and accuracy of pixels, from a confusion matrix [K, K] of integers (rows: true class).

    Definitions are those of torchmetrics' `MulticlassJaccardIndex` and `MulticlassAccuracy` with `average="macro"`.
    Classes in neither masks nor predictions are skipped in means and have no IoU. Classes in predictions only score 0.

    Args:
        names: Class names, in the order of the outputs.
        ignored: Label of ignored pixels.
    """

    def __init__(self, names: Sequence[str], ignored: int) -> None:
        self.names = list(names)
        self.ignored = ignored
        self.confusion = np.zeros((len(names), len(names)), dtype=np.int64)

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K, H, W] and masks [H', W'] of any size; logits are resized to the masks."""
        num_classes = len(self.names)
        for labels, logits in zip(batch["labels"], outputs["logits"], strict=True):
            predictions = resize_logits(logits, labels.shape).argmax(0)
            valid = labels != self.ignored
            cells = labels[valid].long() * num_classes + predictions[valid]
            counts = torch.bincount(cells, minlength=num_classes**2)
            self.confusion += counts.reshape(num_classes, num_classes).cpu().numpy()

    def merge(self, other: SegmentationMetrics) -> None:
        """Adds the counts of another process."""
        self.confusion += other.confusion

    def compute(self) -> dict[str, float]:
        """Returns `mean_iou`, `pixel_accuracy`, `mean_accuracy` and `iou/CLASS`; NaN if no pixel has a class."""
        intersection = self.confusion.diagonal()
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        union = true + predicted - intersection
        occurs = union > 0
        if not true.any():
            return dict.fromkeys(("mean_iou", "pixel_accuracy", "mean_accuracy"), float("nan"))
        iou = intersection[occurs] / union[occurs]
        recall = intersection[occurs] / np.maximum(true[occurs], 1)
        per_class = {
            f"iou/{self.names[index]}": float(value) for index, value in zip(np.nonzero(occurs)[0], iou, strict=True)
        }
        return {
            "mean_iou": float(iou.mean()),
            "pixel_accuracy": float(intersection.sum() / true.sum()),
            "mean_accuracy": float(recall.mean()),
        } | per_class


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Returns logits [K, H, W] resized to a height and width, as in the post-processing of transformers."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return functional.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
