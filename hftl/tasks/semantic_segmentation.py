"""A class for each pixel of an image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from PIL.Image import Image as Picture

from hftl.data.splits import Splits
from hftl.loading.loader import Example
from hftl.preprocessing.joint_transforms import GeometryRows
from hftl.tasks.inputs import ImageInputs
from hftl.tasks.targets.segmentation.masks import find_image_and_mask
from hftl.tasks.targets.segmentation.target import SegmentationTarget
from hftl.tasks.task import Batch, SupervisedTask

if TYPE_CHECKING:
    from datasets import Dataset


class SemanticSegmentation(SupervisedTask):
    """Images with a mask each, on any timm backbone with a UPerNet decoder."""

    name = "semantic_segmentation"
    model_class = "UperNetForSemanticSegmentation"
    pipeline_tag = "image-segmentation"
    primary_metrics = ("mean_iou", "pixel_accuracy", "mean_accuracy")
    defaults = {
        "full": {"lr": 5e-4, "head_lr": 3e-3, "num_epochs": 12, "freeze_backbone_ratio": 0.0},
        "frozen": {"lr": 0.0, "head_lr": 3e-3, "num_epochs": 12},
        "lora": {"lr": 1e-3, "head_lr": 3e-3, "num_epochs": 12},
        "scratch": {"lr": 3e-3, "head_lr": 3e-3, "num_epochs": 12},
    }
    usage = """
import transformers

segment = transformers.pipeline("image-segmentation", "{place}")
for found in segment("picture.jpg"):  # for each class in the picture a mask of its size
    print(found["label"], found["mask"].size)
"""
    inputs_type = ImageInputs
    target_types = (SegmentationTarget,)
    inputs: ImageInputs
    target: SegmentationTarget

    def __init__(self, splits: Splits) -> None:
        image, mask = find_image_and_mask(splits["train"].features, splits.config)
        super().__init__(ImageInputs.find(splits, image), SegmentationTarget.find(splits, image, mask))

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> _MaskedRows:
        """Returns rows whose images and masks are decoded and moved alike when fetched."""
        from datasets import Image

        inputs, target = self.inputs, self.target
        rows = dataset.select_columns([name for name in (inputs.column, target.column) if name in dataset.column_names])
        if target.column in rows.column_names:
            rows = rows.cast_column(target.column, Image(decode=False))
        split = inputs.split_of.get(dataset._fingerprint, "")
        places = partial(target.places, max_pixels=inputs.max_pixels)
        return _MaskedRows(rows, inputs.column, processor, seed, places, inputs.max_pixels, split)

    def collate(self, examples: list[Example]) -> Batch:
        """Returns `inputs`, `labels` (masks) and `size` (height and width of each picture)."""
        return super().collate(examples) | {"size": [example["size"] for example in examples]}

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> SegmentationTarget:
        """See `SupervisedTask.make_target`."""
        return SegmentationTarget(**state)


class _MaskedRows(GeometryRows):
    """Adds `mask` [H, W]: in training as it was moved, in evaluation as it is, where it is measured."""

    def example(self, image: Picture, values: dict[str, Any]) -> Example:
        found = super().example(image, values)
        seen = found["places"] if self.seed is None else found["moved"]
        return {"pixel_values": found["pixel_values"], "size": found["size"], "mask": seen.mask if seen else None}
