"""Segmentation metrics from one confusion matrix of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class SegmentationMetrics:
    """IoU and accuracy of pixels, from a confusion matrix [K, K] of integers (rows: true class).

    As torchmetrics' `MulticlassJaccardIndex` and `MulticlassAccuracy` with `average="macro"`: a class that neither
    masks nor predictions have is left out of the means, one that is only predicted scores 0. IoUs of classes that are
    left out are not among the numbers.

    Args:
        names: Class names, in the order of the outputs.
        ignored: Label of pixels that count nowhere.
    """

    def __init__(self, names: Sequence[str], ignored: int) -> None:
        self.names = list(names)
        self.ignored = ignored
        self.confusion = np.zeros((len(names), len(names)), dtype=np.int64)

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds logits [B, K, H, W] against masks [H', W'] of any size: logits are resized to each."""
        classes = len(self.names)
        for labels, logits in zip(batch["labels"], outputs["logits"], strict=True):
            predicted = resized(logits, labels.shape).argmax(0)
            counts = labels != self.ignored
            pairs = labels[counts].long() * classes + predicted[counts]
            self.confusion += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).cpu().numpy()

    def merge(self, other: SegmentationMetrics) -> None:
        """Adds another process's counts."""
        self.confusion += other.confusion

    def compute(self) -> dict[str, float]:
        """Returns `mean_iou`, `pixel_accuracy`, `mean_accuracy` and `iou/CLASS`; NaN where no pixel has a class."""
        right = self.confusion.diagonal()
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        either = true + predicted - right
        seen = either > 0
        if not true.any():
            return dict.fromkeys(("mean_iou", "pixel_accuracy", "mean_accuracy"), float("nan"))
        iou = right[seen] / either[seen]
        recall = right[seen] / np.maximum(true[seen], 1)
        return {
            "mean_iou": float(iou.mean()),
            "pixel_accuracy": float(right.sum() / true.sum()),
            "mean_accuracy": float(recall.mean()),
        } | dict(self._by_class(seen, iou))

    def _by_class(self, seen: Any, iou: Any) -> Iterator[tuple[str, float]]:
        for number, value in zip(np.nonzero(seen)[0], iou, strict=True):
            yield f"iou/{self.names[number]}", float(value)


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Returns logits [K, H, W] at another height and width, as transformers' post-processing makes them."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return functional.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
