"""Tasks: one file each, and the dict that turns a name (in a saved model, or `task:`) into one of ours."""

from __future__ import annotations

from typing import Any

from hftl.errors import ArtifactError, nearest
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.image_text_classification import ImageTextClassification
from hftl.tasks.image_text_retrieval import ImageTextRetrieval
from hftl.tasks.inputs import ImageInputs, TextInputs
from hftl.tasks.object_detection import ObjectDetection
from hftl.tasks.question_answering import QuestionAnswering
from hftl.tasks.semantic_segmentation import SemanticSegmentation
from hftl.tasks.targets.multi_label.target import MultiLabel
from hftl.tasks.targets.regression.target import Regression
from hftl.tasks.targets.single_label.target import SingleLabel
from hftl.tasks.task import SupervisedTask, Task
from hftl.tasks.text_classification import TextClassification
from hftl.tasks.text_embedding import TextEmbedding
from hftl.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "ImageInputs",
    "MultiLabel",
    "Regression",
    "SingleLabel",
    "SupervisedTask",
    "Task",
    "TextInputs",
    "restore",
]

TASKS: dict[str, Any] = {
    "image_classification": ImageClassification,
    "semantic_segmentation": SemanticSegmentation,
    "object_detection": ObjectDetection,
    "text_classification": TextClassification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "text_embedding": TextEmbedding,
    "image_text_classification": ImageTextClassification,
    "image_text_retrieval": ImageTextRetrieval,
}
"""Name -> class (a `SupervisedTask`), called with the splits."""


def restore(name: str, state: dict[str, Any]) -> Task:
    """Returns a task of ours from its name and `state()`, without any data.

    Raises:
        ArtifactError: The name is not one of ours: a task of your own is restored by your own code.
    """
    if name not in TASKS:
        raise ArtifactError(
            f"task '{name}' is not built in ({', '.join(TASKS)}); use the recipe that defined it.{nearest(name, TASKS)}"
        )
    return TASKS[name].restored(state)
