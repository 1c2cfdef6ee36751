"""Object detection: classes and bounding boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hftl.data.splits import Splits
from hftl.data.validation import InvalidRows, validate_rows
from hftl.loading.loader import Example
from hftl.preprocessing.joint_transforms import GeometryRows, Places
from hftl.tasks.inputs import ImageInputs
from hftl.tasks.targets.detection.target import DetectionTarget
from hftl.tasks.task import Batch, SupervisedTask

if TYPE_CHECKING:
    from datasets import Dataset

    from hftl.tasks.targets.detection.bounding_boxes import ObjectColumn


class ObjectDetection(SupervisedTask):
    """Object detection with RT-DETR on any timm backbone, or with a transformers detection model."""

    name = "object_detection"
    model_class = "RTDetrForObjectDetection"
    pipeline_tag = "object-detection"
    primary_metrics = ("ap", "ap50", "ap75")
    defaults = {
        "full": {"lr": 2e-4, "head_lr": 1e-3, "num_epochs": 16, "freeze_backbone_ratio": 0.0},
        "frozen": {"lr": 0.0, "head_lr": 1e-3, "num_epochs": 16},
        "lora": {"lr": 1e-3, "head_lr": 1e-3, "num_epochs": 16},
        "scratch": {"lr": 1e-3, "head_lr": 1e-3, "num_epochs": 50},
    }
    usage = """
import transformers

detector = transformers.pipeline("object-detection", "{place}")
for detection in detector("image.jpg", threshold=0.3):
    print(detection["label"], detection["score"], detection["box"])  # corners in pixels
"""
    inputs_type = ImageInputs
    target_types = (DetectionTarget,)
    inputs: ImageInputs
    target: DetectionTarget

    def __init__(self, splits: Splits) -> None:
        inputs = ImageInputs.find(splits)
        super().__init__(inputs, DetectionTarget.find(splits, inputs.column))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> DetectionTarget:
        """See `SupervisedTask.make_target`."""
        return DetectionTarget(**state)

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> DetectionRows:
        """Returns examples whose images are decoded on access; geometric transforms also apply to the boxes."""
        inputs, target = self.inputs, self.target
        columns = [inputs.column, *(name for name in target.columns if name in dataset.column_names)]
        rows = dataset.select_columns(columns)
        column = target.reader(rows) if len(columns) > 1 else None
        split = inputs.split_of.get(dataset._fingerprint, "")
        return DetectionRows(target, column, rows, inputs.column, processor, seed, inputs.max_pixels, split)

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; adds `size`, original height and width of each image in pixels [B, 2]."""
        return super().collate(examples) | {"size": torch.tensor([example["size"] for example in examples])}

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows with an unreadable image or invalid objects."""
        return validate_rows(splits, [self.inputs, _BoxValidator(self.target, self.inputs.column)])


class DetectionRows(GeometryRows):
    """Rows with images and their objects.

    Args:
        target: Target with the classes.
        column: Layout of the object column; None for rows without objects.
        *rows: Arguments of `ImageRows`: dataset, image column, processor, seed, max_pixels, split.
    """

    def __init__(self, target: DetectionTarget, column: ObjectColumn | None, *rows: Any) -> None:
        dataset, image, processor, seed, max_pixels, split = rows
        super().__init__(dataset, image, processor, seed, self._annotations, max_pixels, split)
        self.target = target
        self.objects = column

    def _annotations(self, values: dict[str, Any], size: tuple[int, int]) -> Places | None:
        if self.objects is None:
            return None
        return self.target.places(values[self.objects.name], self.objects, size)

    def example(self, image: Any, values: dict[str, Any]) -> Example:
        """See `GeometryRows.example`; adds `column`, the layout of the object column."""
        return super().example(image, values) | {"column": self.objects}


class _BoxValidator:
    """Validator of objects, for rows with readable images."""

    def __init__(self, target: DetectionTarget, image: str) -> None:
        self.target = target
        self.image = image

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        return self.target.invalid_rows(splits, self.image)
