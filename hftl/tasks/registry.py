"""Registry of built-in tasks, and error messages for unsupported capabilities."""

from __future__ import annotations

from typing import Any

from hftl.errors import ArtifactError, nearest
from hftl.tasks.capabilities import Capability, capabilities_of, supported, target_info
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.image_text_classification import ImageTextClassification
from hftl.tasks.image_text_retrieval import ImageTextRetrieval
from hftl.tasks.inputs import ImageInputs, TextInputs
from hftl.tasks.object_detection import ObjectDetection
from hftl.tasks.question_answering import QuestionAnswering
from hftl.tasks.semantic_segmentation import SemanticSegmentation
from hftl.tasks.targets.multi_label.target import MultiLabelTarget
from hftl.tasks.targets.regression.target import RegressionTarget
from hftl.tasks.targets.single_label.target import SingleLabelTarget
from hftl.tasks.task import SupervisedTask, Task
from hftl.tasks.text_classification import TextClassification
from hftl.tasks.text_embedding import TextEmbedding
from hftl.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "ImageInputs",
    "MultiLabelTarget",
    "RegressionTarget",
    "SingleLabelTarget",
    "SupervisedTask",
    "Task",
    "TextInputs",
    "restore",
    "unsupported",
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
"""Name in the setting `task` and in saved models -> class, a `SupervisedTask` constructed from the splits."""
_MESSAGES: dict[Capability, tuple[str, str]] = {
    Capability.COMPARE: (
        "task: hftl compare does not support",
        "Train each method with `hftl run` and compare the runs with `hftl report RUN RUN`.",
    ),
    Capability.INTERVALS: ("report: confidence intervals do not support", "Repeat the run with other seeds."),
    Capability.DEMO: ("task: hftl demo does not support", "Use `hftl predict`."),
    Capability.PROBE: ("adapt.method: 'probe' does not support", "Set another method."),
    Capability.CLASS_CHECKS: ("checks that compare classes do not support", "Remove them from the list of checks."),
    Capability.EXPORT: ("task: hftl export does not support", "Use the code in the model card to load the model."),
}
"""Start of the error message of each capability, and the alternative."""


def restore(name: str, state: dict[str, Any]) -> Task:
    """Returns a built-in task from its name and `state()`, without data.

    Raises:
        ArtifactError: The name is not a built-in task; custom tasks are restored by the code that defines them.
    """
    if name not in TASKS:
        raise ArtifactError(
            f"task: '{name}' is not a built-in task; allowed: {', '.join(TASKS)}.{nearest(name, TASKS)} "
            "Use the recipe that defines a custom task."
        )
    return TASKS[name].restored(state)


def unsupported(task: Task, capability: Capability) -> str:
    """Returns the error message if a task does not support a capability, with the tasks that do; else "".

    All commands check capabilities by this function before they train, serve or write.
    """
    if capability in capabilities_of(task):
        return ""
    fact, alternative = _MESSAGES[capability]
    label_kind = target_info(getattr(task, "target", task)).label_kind
    return f"{fact} {task.name} ({label_kind}); allowed: {_tasks_with(capability)}. {alternative}"


def _tasks_with(capability: Capability) -> str:
    """Returns the tasks that support a capability, each with the supported kinds of labels."""
    names_by_kinds: dict[tuple[str, ...], list[str]] = {}
    for name, task_class in TASKS.items():
        kinds = [
            target_info(target_class).label_kind
            for target_class in task_class.target_types
            if capability in supported(target_class, task_class.inputs_type)
        ]
        if kinds:
            names_by_kinds.setdefault(tuple(kinds), []).append(name)
    return "; ".join(f"{', '.join(names)} ({', '.join(kinds)})" for kinds, names in names_by_kinds.items())
