"""Semantic segmentation: one class per pixel."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

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
    """Semantic segmentation with a UPerNet decoder on any timm backbone."""

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

segmenter = transformers.pipeline("image-segmentation", "{place}")
for segment in segmenter("image.jpg"):  # one mask of the image's size per predicted class
    print(segment["label"], segment["mask"].size)
"""
    inputs_type = ImageInputs
    target_types = (SegmentationTarget,)
    inputs: ImageInputs
    target: SegmentationTarget

    def __init__(self, splits: Splits) -> None:
        image, mask = find_image_and_mask(splits["train"].features, splits.config)
        super().__init__(ImageInputs.find(splits, image), SegmentationTarget.find(splits, image, mask))

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> _MaskedRows:
        """Returns examples whose images and masks are decoded on access, with the same geometric transforms."""
        from datasets import Image as ImageFeature

        inputs, target = self.inputs, self.target
        rows = dataset.select_columns([name for name in (inputs.column, target.column) if name in dataset.column_names])
        if target.column in rows.column_names:
            rows = rows.cast_column(target.column, ImageFeature(decode=False))
        split = inputs.split_of.get(dataset._fingerprint, "")
        annotations = partial(target.places, max_pixels=inputs.max_pixels)
        return _MaskedRows(rows, inputs.column, processor, seed, annotations, inputs.max_pixels, split)

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`; labels are masks. Adds `size`, height and width of each image in pixels."""
        return super().collate(examples) | {"size": [example["size"] for example in examples]}

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> SegmentationTarget:
        """See `SupervisedTask.make_target`."""
        return SegmentationTarget(**state)


class _MaskedRows(GeometryRows):
    """Rows with `mask` [H, W]: transformed with the image for training, in its original size for evaluation."""

    def example(self, image: Image, values: dict[str, Any]) -> Example:
        example = super().example(image, values)
        annotations = example["places"] if self.seed is None else example["moved"]
        mask = annotations.mask if annotations else None
        return {"pixel_values": example["pixel_values"], "size": example["size"], "mask": mask}
