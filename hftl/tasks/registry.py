"""Built-in tasks by name (in a saved model, or `task:`), and the question what a task supports."""

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
"""Name -> class (a `SupervisedTask`), called with the splits."""
_WORDS: dict[Capability, tuple[str, str]] = {
    Capability.COMPARE: (
        "task: hftl compare does not support",
        "Train each method with `hftl run` and put the runs side by side with `hftl report RUN RUN`.",
    ),
    Capability.INTERVALS: ("report: confidence intervals do not support", "Repeat the run with other seeds."),
    Capability.DEMO: ("task: hftl demo does not support", "Use `hftl predict`."),
    Capability.PROBE: ("adapt.method: 'probe' does not support", "Set another method."),
    Capability.CLASS_CHECKS: ("checks that compare classes do not support", "Leave them out."),
    Capability.EXPORT: ("task: hftl export does not support", "Load the model as the code in its model card does."),
}
"""How a problem of each capability begins, and what to do instead."""


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


def unsupported(task: Task, capability: Capability) -> str:
    """Returns why a task does not support a capability, and which tasks do, as one problem; empty if it does.

    Every command asks this, and nothing else, before it trains, serves or writes anything.
    """
    if capability in capabilities_of(task):
        return ""
    fact, instead = _WORDS[capability]
    labels = target_info(getattr(task, "target", task)).label_kind
    return f"{fact} {task.name} ({labels}); allowed: {_tasks_with(capability)}. {instead}"


def _tasks_with(capability: Capability) -> str:
    """Returns the tasks that support a capability, with the kinds of labels they support it for."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for name, made in TASKS.items():
        kinds = [
            target_info(each).label_kind
            for each in made.target_types
            if capability in supported(each, made.inputs_type)
        ]
        if kinds:
            tasks.setdefault(tuple(kinds), []).append(name)
    return "; ".join(f"{', '.join(names)} ({', '.join(kinds)})" for kinds, names in tasks.items())
