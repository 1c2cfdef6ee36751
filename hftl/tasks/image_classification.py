"""Image classification (single-label or multi-label) and image regression."""

from __future__ import annotations

from typing import Any

from hftl.data.splits import Splits
from hftl.tasks.inputs import ImageInputs
from hftl.tasks.targets.label_target import TARGETS, LabelTarget, find_target, restore_target
from hftl.tasks.task import SupervisedTask


class ImageClassification(SupervisedTask):
    """Single-label or multi-label classification, or regression, of images with any timm model."""

    name = "image_classification"
    model_class = "timm"

    inputs_type = ImageInputs
    target_types = tuple(TARGETS.values())

    def __init__(self, splits: Splits) -> None:
        super().__init__(ImageInputs.find(splits), find_target(splits))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> LabelTarget:
        """See `SupervisedTask.make_target`."""
        return restore_target(state)
