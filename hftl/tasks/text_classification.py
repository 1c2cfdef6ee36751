"""Text classification (single-label or multi-label) and text regression, for texts and text pairs."""

from __future__ import annotations

from typing import Any

from hftl.data.splits import Splits
from hftl.tasks.inputs import TextInputs
from hftl.tasks.targets.label_target import TARGETS, LabelTarget, find_target, restore_target
from hftl.tasks.task import SupervisedTask


class TextClassification(SupervisedTask):
    """Single-label or multi-label classification, or regression, of texts or text pairs with any BERT-family model."""

    name = "text_classification"
    model_class = "AutoModelForSequenceClassification"

    inputs_type = TextInputs
    target_types = tuple(TARGETS.values())

    def __init__(self, splits: Splits) -> None:
        super().__init__(TextInputs.find(splits), find_target(splits))

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> LabelTarget:
        """See `SupervisedTask.make_target`."""
        return restore_target(state)
