"""One class for each image."""

from __future__ import annotations

from hftl.data.source import Splits
from hftl.tasks.inputs import ImageInputs
from hftl.tasks.single_label import SingleLabel
from hftl.tasks.task import SupervisedTask


class ImageClassification(SupervisedTask):
    """Images with one label each, on any timm model."""

    name = "image_classification"
    stock = "timm"

    def __init__(self, splits: Splits) -> None:
        super().__init__(ImageInputs.find(splits), SingleLabel.find(splits))
