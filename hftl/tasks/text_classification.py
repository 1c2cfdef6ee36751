"""One class for each text or pair of texts."""

from __future__ import annotations

from hftl.data.source import Splits
from hftl.tasks.inputs import TextInputs
from hftl.tasks.single_label import SingleLabel
from hftl.tasks.task import SupervisedTask


class TextClassification(SupervisedTask):
    """Texts, or pairs of texts, with one label each, on any BERT-family model."""

    name = "text_classification"
    stock = "AutoModelForSequenceClassification"

    def __init__(self, splits: Splits) -> None:
        super().__init__(TextInputs.find(splits), SingleLabel.find(splits))
