"""One class for each pixel: cross entropy over the pixels that have one."""

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
from hftl.tasks.targets.segmentation.masks import MaskClasses, bad_masks_sentence, find_classes, outside, survey_masks
from hftl.tasks.targets.segmentation.metrics import SegmentationMetrics, resized
from hftl.tasks.task import Batch, Outputs

IGNORED = -1
"""Label of pixels without a class; masks are int16 with K < 32,768 classes."""
_UNKNOWN = -2
_AUXILIARY = 0.4
"""Weight of the auxiliary head's loss (Zhao et al. 2017, https://arxiv.org/abs/1612.01105, section 3.4)."""


class SegmentationTarget:
    """Masks as classes 0..K-1 for each pixel.

    Args:
        column: The column with masks.
        classes: Their names, in the order of the outputs.
        numbers: The number of each class in masks, in the same order.
        void: Numbers in masks that mean no class.
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
        """Reads every mask and finds the classes; what is wrong goes into `problems`."""
        config = splits.config
        lacking = splits_without(splits, mask.name)
        surveys = _surveys(splits, image.name, mask.name)
        taught = [seen for split in splits.labelled_by_source for seen in surveys.get(split, ())]
        present = sorted({value for seen in taught if not isinstance(seen, BadRow) for value in seen})
        classes = find_classes(present, splits.class_names, config.ignore_index)
        found = cls(mask.name, classes.names, classes.values, classes.void)
        found.image_column = image.name
        void = [f"{value}{_named(value, splits.class_names)}" for value in classes.void if value in present]
        log(
            f"data: masks from column '{mask.name}' ({mask.why}); {len(classes.names)} classes {classes.origin}: "
            f"{shorten(classes.names)}; void: {', '.join(void) or 'none'}"
        )
        found.problems = [*lacking, *augment_problems(config.augment), *found._too_few(present)]
        for split, survey in surveys.items():
            if not splits.lenient:
                bad = outside(survey, classes, mask.name)
                found.problems += bad_masks_sentence(bad, split, classes)
            empty = sum(not isinstance(seen, BadRow) and set(seen) <= set(classes.void) for seen in survey)
            if empty:
                log(f"data: {split}: {empty} mask(s) are void throughout; these rows teach and count nothing")
        return found

    def _too_few(self, present: Sequence[int]) -> list[str]:
        if len(self.names) > 1 or not present:
            return []
        return [
            f"data.label_column: masks hold the value(s) {shorten([str(value) for value in present])}, of which "
            f"{', '.join(map(str, self.classes.void)) or 'none'} counts as void: that leaves {len(self.names)} class, "
            "and two are needed. Where 255 is a class, say --data.ignore_index -1."
        ]

    def places(self, values: dict[str, Any], size: tuple[int, int], max_pixels: int) -> Places | None:
        """Returns the mask of a row as classes [H, W], int16 with `IGNORED` for void; None where the row has none.

        Raises:
            DataError: It cannot be decoded, is of another size than the image, or holds numbers of no class.
        """
        stored = values.get(self.column)
        if stored is None:
            return None
        try:
            numbers = decode_indices(stored, max_pixels)
        except DataError as error:
            raise DataError(f"the mask ({place(stored)}) cannot be used: {error}.") from error
        if numbers.shape != size:
            raise DataError(
                f"the mask ({place(stored)}) has {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                f"{size[1]} x {size[0]}."
            )
        classes = self.class_of[numbers.clip(0, 65535)]
        strange = (classes == _UNKNOWN) | (numbers < 0) | (numbers > 65535)
        if strange.any():
            listed = [str(value) for value in np.unique(numbers[strange])]
            raise DataError(f"the mask ({place(stored)}) has the value(s) {shorten(listed)} of no class.")
        return Places(mask=torch.from_numpy(classes))

    def head(self, model_class: str) -> HeadSpec:
        """Returns a head with one output per class."""
        return HeadSpec(model_class, len(self.names), tuple(self.names), None)

    def labels(self, examples: list[Example]) -> Any:
        """Returns the masks: [B, H, W] where all are of one size, else a list; None where a row has none."""
        masks = [example["mask"] for example in examples]
        if any(mask is None for mask in masks):
            return None
        return torch.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns for each row the mean cross entropy of its pixels that have a class [B]; 0 where none has.

        Logits are resized to the mask. The auxiliary head's loss is added with its weight.
        """
        total = _cross_entropy(outputs["logits"], labels)
        if "auxiliary_logits" in outputs:
            total = total + _AUXILIARY * _cross_entropy(outputs["auxiliary_logits"], labels)
        return total

    def metrics(self) -> list[Metric]:
        """Returns IoU and pixel accuracy."""
        return [SegmentationMetrics(self.names, IGNORED)]

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns the class of most pixels, its share of the picture, the share of every class, and the mask.

        `mask_png` is a PNG at the size of the picture, base64, with the numbers that masks of the data have.
        """
        rows = []
        for logits, size in zip(outputs["logits"], batch["size"], strict=True):
            classes = resized(logits, size).argmax(0).cpu()
            shares = (torch.bincount(classes.ravel(), minlength=len(self.names)) / classes.numel()).tolist()
            most = int(np.argmax(shares))
            png = _png(np.asarray(self.classes.values)[classes.numpy()])
            rows.append({"prediction": self.names[most], "share": shares[most], "shares": shares, "mask_png": png})
        return rows

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows without a mask that fits: missing, damaged, of another size, or with unknown numbers."""
        surveys = _surveys(splits, self.image_column, self.column)
        return {split: outside(found, self.classes, self.column) for split, found in surveys.items()}

    def state(self) -> dict[str, Any]:
        """Returns column, class names, their numbers and void numbers."""
        return {
            "column": self.column,
            "classes": self.names,
            "numbers": list(self.classes.values),
            "void": list(self.classes.void),
        }


def _surveys(splits: Splits, image: str, mask: str) -> dict[str, list[BadRow | tuple[int, ...]]]:
    """Looks at the masks of all splits that have them."""
    limit = splits.config.max_pixels
    with_masks = {split: rows for split, rows in splits.items() if mask in rows.features}
    return {split: survey_masks(rows, image, mask, split, limit) for split, rows in with_masks.items()}


def _named(value: int, names: Sequence[str] | None) -> str:
    return f" ({names[value]})" if names and value < len(names) else ""


def _cross_entropy(logits: Tensor, labels: Any) -> Tensor:
    """Returns the mean over the pixels of each row [B], in float32.

    Row by row where logits have to be resized: masks of large pictures, times classes, times rows, fill a memory.
    """
    if not isinstance(labels, Tensor) or logits.shape[-2:] != labels.shape[-2:]:
        pairs = zip(logits, labels, strict=True)
        return torch.cat([_cross_entropy(resized(row.float(), mask.shape)[None], mask[None]) for row, mask in pairs])
    losses = functional.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="none")
    return losses.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)


def _png(numbers: np.ndarray) -> str:
    from PIL import Image

    kind = np.uint8 if numbers.max(initial=0) < 256 else np.uint16
    out = BytesIO()
    Image.fromarray(numbers.astype(kind)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
