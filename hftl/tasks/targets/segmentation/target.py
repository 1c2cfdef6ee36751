"""Semantic segmentation: cross entropy over labeled pixels."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hftl.data.columns import Column, splits_without
from hftl.data.image_decoding import decode_indices, place
from hftl.data.splits import Splits
from hftl.data.validation import BadRow, InvalidRows
from hftl.errors import DataError, shorten
from hftl.loading.loader import Example
from hftl.logging import log
from hftl.models.task_model import HeadSpec
from hftl.preprocessing.joint_transforms import Places, augment_problems
from hftl.tasks.capabilities import TargetInfo
from hftl.tasks.metrics import Metric
from hftl.tasks.targets.segmentation.masks import (
    MaskClasses,
    find_classes,
    invalid_masks,
    mask_problems,
    survey_masks,
)
from hftl.tasks.targets.segmentation.metrics import SegmentationMetrics, resize_logits
from hftl.tasks.task import Batch, Outputs

IGNORED = -1
"""Label of pixels without a class; masks are int16 with K < 32,768 classes."""
_UNKNOWN = -2
_AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary head's loss (Zhao et al. 2017, https://arxiv.org/abs/1612.01105, section 3.4)."""


class SegmentationTarget:
    """Classes 0..K-1, one per pixel.

    Args:
        column: The mask column.
        classes: Class names, in the order of the outputs.
        numbers: Mask value of each class, in the same order.
        void: Mask values without a class.
    """

    best_metric = "mean_iou"
    info = TargetInfo("masks")

    def __init__(self, column: str, classes: Sequence[str], numbers: Sequence[int], void: Sequence[int]) -> None:
        self.column = column
        self.columns = [column]
        self.names = list(classes)
        self.classes = MaskClasses(tuple(classes), tuple(numbers), tuple(void), "")
        self.problems: list[str] = []
        self.image_column = ""
        self.class_of = np.full(65536, _UNKNOWN, dtype=np.int16)
        self.class_of[list(void)] = IGNORED
        self.class_of[list(numbers)] = range(len(numbers))

    @classmethod
    def find(cls, splits: Splits, image: Column, mask: Column) -> SegmentationTarget:
        """Decodes every mask, detects the classes, and collects errors in `problems`."""
        config = splits.config
        missing_column = splits_without(splits, mask.name)
        surveys = _surveys(splits, image.name, mask.name)
        labeled = [values for split in splits.labelled_by_source for values in surveys.get(split, ())]
        present = sorted({value for values in labeled if not isinstance(values, BadRow) for value in values})
        classes = find_classes(present, splits.class_names, config.ignore_index)
        target = cls(mask.name, classes.names, classes.values, classes.void)
        target.image_column = image.name
        void = [f"{value}{_name_suffix(value, splits.class_names)}" for value in classes.void if value in present]
        log(
            f"data: masks from column '{mask.name}' ({mask.why}); {len(classes.names)} classes {classes.origin}: "
            f"{shorten(classes.names)}; void: {', '.join(void) or 'none'}"
        )
        target.problems = [*missing_column, *augment_problems(config.augment), *target._class_problems(present)]
        for split, survey in surveys.items():
            if not splits.lenient:
                target.problems += mask_problems(invalid_masks(survey, classes, mask.name), split, classes)
            all_void = sum(not isinstance(values, BadRow) and set(values) <= set(classes.void) for values in survey)
            if all_void:
                log(f"data: {split}: {all_void} mask(s) contain only void pixels; loss and metrics ignore them")
        return target

    def _class_problems(self, present: Sequence[int]) -> list[str]:
        if len(self.names) > 1 or not present:
            return []
        return [
            f"data.label_column: training masks hold the value(s) {shorten([str(value) for value in present])}, void: "
            f"{', '.join(map(str, self.classes.void)) or 'none'}; {len(self.names)} class(es) remain, two are needed. "
            "If 255 is a class, set --data.ignore_index -1."
        ]

    def places(self, values: dict[str, Any], size: tuple[int, int], max_pixels: int) -> Places | None:
        """Returns the mask of a row as class indices [H, W], for joint transforms; None if the row has no mask.

        Args:
            values: Cells of the row by column.
            size: Height and width of the image in pixels.
            max_pixels: Largest number of pixels of an image (`data.max_pixels`).

        Returns:
            The mask in int16; `IGNORED` for void pixels.

        Raises:
            DataError: The mask cannot be decoded, differs from the image in size, or has values without a class.
        """
        stored = values.get(self.column)
        if stored is None:
            return None
        try:
            numbers = decode_indices(stored, max_pixels)
        except DataError as error:
            raise DataError(f"mask ({place(stored)}) is invalid: {error}.") from error
        if numbers.shape != size:
            raise DataError(
                f"mask ({place(stored)}) has {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                f"{size[1]} x {size[0]}."
            )
        classes = self.class_of[numbers.clip(0, 65535)]
        unknown = (classes == _UNKNOWN) | (numbers < 0) | (numbers > 65535)
        if unknown.any():
            listed = [str(value) for value in np.unique(numbers[unknown])]
            raise DataError(f"mask ({place(stored)}) has value(s) {shorten(listed)} without a class.")
        return Places(mask=torch.from_numpy(classes))

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per class."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), None)

    def labels(self, examples: list[Example]) -> Any:
        """Returns the masks [B, H, W], as a list if their sizes differ, or None if a row has no mask."""
        masks = [example["mask"] for example in examples]
        if any(mask is None for mask in masks):
            return None
        return torch.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns the mean cross entropy over the labeled pixels of each example [B]; 0 without labeled pixels.

        Logits are resized to the mask. The loss of the auxiliary head is added with its weight.
        """
        total = _cross_entropy(outputs["logits"], labels)
        if "auxiliary_logits" in outputs:
            total = total + _AUXILIARY_WEIGHT * _cross_entropy(outputs["auxiliary_logits"], labels)
        return total

    def metrics(self) -> list[Metric]:
        """Returns IoU and pixel accuracy."""
        return [SegmentationMetrics(self.names, IGNORED)]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the most frequent class, its fraction of pixels, the fractions of all classes, and the mask.

        `mask_png` is a base64 PNG at the size of the image, with the mask values of the dataset.
        """
        rows = []
        for logits, size in zip(outputs["logits"], batch["size"], strict=True):
            classes = resize_logits(logits, size).argmax(0).cpu()
            fractions = (torch.bincount(classes.ravel(), minlength=len(self.names)) / classes.numel()).tolist()
            largest = int(np.argmax(fractions))
            png = _png(np.asarray(self.classes.values)[classes.numpy()])
            rows.append(
                {
                    "prediction": self.names[largest],
                    "share": fractions[largest],
                    "shares": fractions,
                    "mask_png": png,
                }
            )
        return rows

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with a mask that is missing, damaged, of another size, or has values without a class."""
        surveys = _surveys(splits, self.image_column, self.column)
        return {split: invalid_masks(survey, self.classes, self.column) for split, survey in surveys.items()}

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "column": self.column,
            "classes": self.names,
            "numbers": list(self.classes.values),
            "void": list(self.classes.void),
        }


def _surveys(splits: Splits, image: str, mask: str) -> dict[str, list[BadRow | tuple[int, ...]]]:
    """Returns the mask values of all splits with masks; see `survey_masks`."""
    max_pixels = splits.config.max_pixels
    with_masks = {split: rows for split, rows in splits.items() if mask in rows.features}
    return {split: survey_masks(rows, image, mask, split, max_pixels) for split, rows in with_masks.items()}


def _name_suffix(value: int, names: Sequence[str] | None) -> str:
    return f" ({names[value]})" if names and value < len(names) else ""


def _cross_entropy(logits: Tensor, labels: Any) -> Tensor:
    """Returns the mean over the labeled pixels of each example [B], in float32.

    Examples are processed one by one if logits are resized: full-size logits of a batch may exceed the memory.
    """
    if not isinstance(labels, Tensor) or logits.shape[-2:] != labels.shape[-2:]:
        pairs = zip(logits, labels, strict=True)
        return torch.cat(
            [_cross_entropy(resize_logits(row.float(), mask.shape)[None], mask[None]) for row, mask in pairs]
        )
    losses = functional.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="none")
    return losses.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)


def _png(values: np.ndarray) -> str:
    from PIL import Image

    dtype = np.uint8 if values.max(initial=0) < 256 else np.uint16
    buffer = BytesIO()
    Image.fromarray(values.astype(dtype)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
