"""Classification and regression of rows with images, texts, numbers and categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from hftl.data.splits import Splits
from hftl.tasks.image_text_inputs import ImageTextInputs
from hftl.tasks.targets.label_target import TARGETS, LabelTarget, find_target, restore_target
from hftl.tasks.task import SupervisedTask


class ImageTextClassification(SupervisedTask):
    """Classification or regression with a timm model, a BERT-family model and a new fusion module."""

    name = "image_text_classification"
    model_class = "ImageTextForClassification"
    primary_metrics = ("accuracy", "roc_auc", "macro_f1")
    inputs_type = ImageTextInputs
    target_types = tuple(TARGETS.values())
    defaults: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "frozen": {"lr": 0.0, "head_lr": 3e-4, "num_epochs": 10},
        "lora": {"lr": 5e-4, "head_lr": 1e-3, "num_epochs": 4},
        "full": {"lr": 3e-5, "head_lr": 1e-3, "num_epochs": 4, "freeze_backbone_ratio": 0.25},
        "scratch": {"lr": 3e-4, "head_lr": 3e-4, "num_epochs": 5},
    }
    inputs: ImageTextInputs

    def __init__(self, splits: Splits) -> None:
        target = find_target(splits)
        inputs = ImageTextInputs.find(splits, target.columns)
        super().__init__(inputs, target)
        self.head = replace(self.head, options=inputs.options)
        self.usage = _usage(inputs, self.head.problem_type)

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> LabelTarget:
        """See `SupervisedTask.make_target`."""
        return restore_target(state)


_PREDICTION_CODE = {
    "single_label_classification": "model.config.id2label[logits[0].argmax().item()]",
    "multi_label_classification": "dict(zip(model.config.id2label.values(), logits[0].sigmoid().tolist()))",
    "regression": "dict(zip(model.config.id2label.values(), logits[0].tolist()))",
}


def _usage(inputs: ImageTextInputs, problem_type: str | None) -> str:
    """Returns Python code for a prediction on one row with a saved model, with example values for its inputs."""
    arguments = {"images": '[Image.open("photo.jpg")]'} if inputs.image else {}
    arguments |= {"text": '["A dog runs on the grass."]'} if inputs.texts else {}
    numbers = [round(mean, 3) for mean in inputs.numbers["mean"]]
    categories = [next(iter(values), None) for values in inputs.categories.values()]
    arguments |= {name: f"[{values}]" for name, values in (("numbers", numbers), ("categories", categories)) if values}
    lines = [
        "import transformers",
        *(["from PIL import Image"] if inputs.image else []),
        "",
        'processor = transformers.AutoProcessor.from_pretrained("{place}", trust_remote_code=True)',
        'model = transformers.AutoModel.from_pretrained("{place}", trust_remote_code=True).eval()',
        f"inputs = processor({', '.join(f'{name}={value}' for name, value in arguments.items())})",
        "logits = model(**inputs).logits",
        _PREDICTION_CODE[problem_type or "regression"],
    ]
    return "\n".join(lines)
