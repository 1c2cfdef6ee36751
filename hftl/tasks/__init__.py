"""Tasks: one file each, and the dict that turns a name in a saved model into one of ours."""

from __future__ import annotations

from typing import Any

from hftl.errors import ArtifactError, nearest
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.inputs import ImageInputs, TextInputs
from hftl.tasks.single_label import SingleLabel
from hftl.tasks.task import SupervisedTask, Task
from hftl.tasks.text_classification import TextClassification

# name -> (task, its inputs, its target)
_TASKS: dict[str, tuple[type[SupervisedTask], Any, Any]] = {
    "image_classification": (ImageClassification, ImageInputs, SingleLabel),
    "text_classification": (TextClassification, TextInputs, SingleLabel),
}


def restore(name: str, state: dict[str, Any]) -> Task:
    """Returns a task of ours from its name and `state()`, without any data.

    Raises:
        ArtifactError: The name is not one of ours: a task of your own is restored by your own code.
    """
    if name not in _TASKS:
        raise ArtifactError(
            f"task '{name}' is not built in ({', '.join(_TASKS)}); "
            f"use the recipe that defined it.{nearest(name, _TASKS)}"
        )
    kind, inputs, target = _TASKS[name]
    task = kind.__new__(kind)
    SupervisedTask.__init__(task, inputs(**state["inputs"]), target(**state["target"]))
    return task
