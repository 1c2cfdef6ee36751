"""Images with boxes: what is where."""

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
    """Column and classes are detected from the data."""

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

detect = transformers.pipeline("object-detection", "{place}")
for found in detect("picture.jpg", threshold=0.3):
    print(found["label"], found["score"], found["box"])  # corners in pixels
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
        """Returns rows whose images are decoded when fetched, and whose boxes move with the pixels."""
        inputs, target = self.inputs, self.target
        columns = [inputs.column, *(name for name in target.columns if name in dataset.column_names)]
        rows = dataset.select_columns(columns)
        column = target.reader(rows) if len(columns) > 1 else None
        split = inputs.split_of.get(dataset._fingerprint, "")
        return DetectionRows(target, column, rows, inputs.column, processor, seed, inputs.max_pixels, split)

    def collate(self, examples: list[Example]) -> Batch:
        """Also returns `size`, height and width of each image as it came [B, 2]."""
        return super().collate(examples) | {"size": torch.tensor([example["size"] for example in examples])}

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows whose image cannot be decoded or whose objects cannot be used."""
        return validate_rows(splits, [self.inputs, _Boxes(self.target, self.inputs.column)])


class DetectionRows(GeometryRows):
    """Rows with images and the objects in them.

    Args:
        target: Knows the classes.
        column: How objects are read; None where the rows have none.
        *rows: As `ImageRows` takes them.
    """

    def __init__(self, target: DetectionTarget, column: ObjectColumn | None, *rows: Any) -> None:
        dataset, image, processor, seed, max_pixels, split = rows
        super().__init__(dataset, image, processor, seed, self._places, max_pixels, split)
        self.target = target
        self.objects = column

    def _places(self, values: dict[str, Any], size: tuple[int, int]) -> Places | None:
        if self.objects is None:
            return None
        return self.target.places(values[self.objects.name], self.objects, size)

    def example(self, image: Any, values: dict[str, Any]) -> Example:
        """As `GeometryRows.example`, with the `column` that says how objects are read."""
        return super().example(image, values) | {"column": self.objects}


class _Boxes:
    """Judges the objects of rows whose images are fine."""

    def __init__(self, target: DetectionTarget, image: str) -> None:
        self.target = target
        self.image = image

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        return self.target.invalid_rows(splits, self.image)
