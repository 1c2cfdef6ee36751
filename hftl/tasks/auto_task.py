"""Which task fits some data, where nobody has named one: by columns and their types, and said why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.columns import find_column, find_text_columns
from hftl.data.roles import ROLES, is_usual_name, usual_column
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError, nearest
from hftl.logging import log, suppress_logs
from hftl.tasks.registry import TASKS
from hftl.tasks.targets.detection.bounding_boxes import find_objects
from hftl.tasks.task import SupervisedTask

if TYPE_CHECKING:
    from datasets import Features

AUTO = "auto"


def task_of(name: str) -> Callable[[Splits], SupervisedTask]:
    """Returns what makes the task that `task` in the configuration names.

    Raises:
        ConfigError: There is no such task.
    """
    if name == AUTO:
        return lambda splits: infer_task(splits)(splits)
    if name not in TASKS:
        raise ConfigError(f"task: '{name}' is not a task; allowed: {AUTO}, {', '.join(TASKS)}.{nearest(name, TASKS)}")
    return TASKS[name]


def infer_task(splits: Splits) -> Callable[[Splits], SupervisedTask]:
    """Returns the class of task whose inputs and labels the columns of `splits` hold, and says why.

    Args:
        splits: Their features decide, and the columns that `splits.config` names.

    Raises:
        DataError: There is neither an image column nor a text column.
    """
    features, config = splits["train"].features, splits.config
    for name, looks_like in _RULES.items():
        why = looks_like(features, config)
        if why:
            log(f"task: {name} ({why})")
            return TASKS[name]
    problems: list[str] = []
    with suppress_logs():
        for look in (_image_error, _text_error):
            problems += look(features, config)
    raise DataError(*problems)


def _object_detection(features: Features, config: DataConfig) -> str:
    if not _images(features):
        return ""
    try:
        column, _ = find_objects(features, config.label_column)
    except DataError:
        return ""
    return f"column '{column.name}' holds boxes"


def _semantic_segmentation(features: Features, config: DataConfig) -> str:
    images = {name: features[name] for name in _images(features)}
    mask = config.label_column if config.label_column in images else _named("mask", images, config.label_column)
    return f"column '{mask}' holds an image for each image" if len(images) == 2 and mask else ""


def _question_answering(features: Features, config: DataConfig) -> str:
    question = _named("question", features, config.text_column)
    context = _named("context", features, config.text_pair_column)
    answers = _named("answers", features, config.label_column) or _other_answers(features, config)
    return f"columns '{question}', '{context}' and '{answers}'" if question and context and answers else ""


def _other_answers(features: Features, config: DataConfig) -> str:
    """Returns a column of answers with an unusual name; or with a usual one and a type that its reader rejects."""
    if config.label_column:
        return ""
    typed = [name for name, kind in features.items() if ROLES["answers"].accepts(kind)]
    named = [name for name in features if is_usual_name("answers", name) and not _labelled(features, config)]
    return typed[0] if len(typed) == 1 else next(iter(named), "")


def _token_classification(features: Features, config: DataConfig) -> str:
    words = _named("words", features, config.text_column)
    lists = {name: kind for name, kind in features.items() if name != words and ROLES["tags"].accepts(kind)}
    tags = _named("tags", lists, config.label_column)
    if not (tags or config.label_column):
        tags = next((name for name in lists if "tag" in name.lower()), "")
    return f"column '{words}' holds words and '{tags}' a tag for each" if words and tags else ""


def _image_text_retrieval(features: Features, config: DataConfig) -> str:
    captions = _named("captions", features, config.text_column)
    unlabelled = not _labelled(features, config)
    return f"images with captions in column '{captions}'" if _images(features) and captions and unlabelled else ""


def _image_text_classification(features: Features, config: DataConfig) -> str:
    if not (_found("image", features, config.image_column) and _labelled(features, config)):
        return ""
    text = config.text_column or usual_column("text", features)
    return f"images, texts in column '{text}', and labels" if text else ""


def _image_classification(features: Features, config: DataConfig) -> str:
    return "images" if _found("image", features, config.image_column) else ""


def _text_embedding(features: Features, config: DataConfig) -> str:
    with suppress_logs():
        try:
            _, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
    return "pairs of texts without labels" if pair and not _labelled(features, config) else ""


def _text_classification(features: Features, config: DataConfig) -> str:
    with suppress_logs():
        try:
            text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
    # labels and scores train a classifier of pairs, whatever their column is called
    return f"pairs of texts '{text.name}' and '{pair.name}'" if pair else f"texts in column '{text.name}'"


_RULES: dict[str, Callable[[Features, DataConfig], str]] = {
    "object_detection": _object_detection,
    "semantic_segmentation": _semantic_segmentation,
    "question_answering": _question_answering,
    "token_classification": _token_classification,
    "image_text_retrieval": _image_text_retrieval,
    "image_text_classification": _image_text_classification,
    "image_classification": _image_classification,
    "text_embedding": _text_embedding,
    "text_classification": _text_classification,
}
"""The first that gives a reason is the task: those that need more columns stand before those that need fewer."""


def _labelled(features: Features, config: DataConfig) -> bool:
    return bool(config.label_columns) or _found("label", features, config.label_column)


def _found(role: str, features: Features, given: str | None) -> bool:
    with suppress_logs():
        try:
            return bool(find_column(role, features, given))
        except DataError:
            return False


def _image_error(features: Features, config: DataConfig) -> list[str]:
    try:
        find_column("image", features, config.image_column)
    except DataError as error:
        return error.problems
    return []


def _text_error(features: Features, config: DataConfig) -> list[str]:
    try:
        find_text_columns(features, config.text_column, config.text_pair_column)
    except DataError as error:
        return error.problems
    return []


def _images(features: Features) -> list[str]:
    return [name for name, kind in features.items() if ROLES["image"].accepts(kind)]


def _named(role: str, features: Mapping[str, Any], given: str | None) -> str:
    """Returns the column of a role that the configuration or its usual name names; empty where there is none."""
    if given is not None:
        return given if given in features and ROLES[role].accepts(features[given]) else ""
    return usual_column(role, features) or ""
