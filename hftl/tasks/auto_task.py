"""Task detection (`task: auto`) by column names, column types and labels, with the reason in the log."""

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
    """Returns the constructor of the task with this name; `auto` detects the task from the splits.

    Raises:
        ConfigError: No built-in task has this name.
    """
    if name == AUTO:
        return lambda splits: infer_task(splits)(splits)
    if name not in TASKS:
        raise ConfigError(f"task: '{name}' is not a task; allowed: {AUTO}, {', '.join(TASKS)}.{nearest(name, TASKS)}")
    return TASKS[name]


def infer_task(splits: Splits) -> Callable[[Splits], SupervisedTask]:
    """Returns the task class that matches the columns of `splits`, and logs the reason.

    Args:
        splits: Detection uses the features of train and the columns named in `splits.config`.

    Raises:
        DataError: No rule matches: the data have neither an image column nor a text column.
    """
    features, config = splits["train"].features, splits.config
    for name, rule in _RULES.items():
        reason = rule(features, config)
        if reason:
            log(f"task: {name} ({reason})")
            return TASKS[name]
    with suppress_logs():
        problems = [*_image_problems(features, config), *_text_problems(features, config)]
    raise DataError(*problems)


def _object_detection(features: Features, config: DataConfig) -> str:
    if not _image_columns(features):
        return ""
    try:
        column, _ = find_objects(features, config.label_column)
    except DataError:
        return ""
    return f"column '{column.name}' contains boxes"


def _semantic_segmentation(features: Features, config: DataConfig) -> str:
    images = {name: features[name] for name in _image_columns(features)}
    mask = config.label_column if config.label_column in images else _role_column("mask", images, config.label_column)
    return f"column '{mask}' contains a mask per image" if len(images) == 2 and mask else ""


def _question_answering(features: Features, config: DataConfig) -> str:
    question = _role_column("question", features, config.text_column)
    context = _role_column("context", features, config.text_pair_column)
    answers = _role_column("answers", features, config.label_column) or _answers_column(features, config)
    return f"columns '{question}', '{context}' and '{answers}'" if question and context and answers else ""


def _answers_column(features: Features, config: DataConfig) -> str:
    """Returns the only column with the type of answers, or one with a usual name and a type that the task rejects."""
    if config.label_column:
        return ""
    by_type = [name for name, feature in features.items() if ROLES["answers"].accepts(feature)]
    by_name = [name for name in features if is_usual_name("answers", name) and not _has_labels(features, config)]
    return by_type[0] if len(by_type) == 1 else next(iter(by_name), "")


def _token_classification(features: Features, config: DataConfig) -> str:
    words = _role_column("words", features, config.text_column)
    lists = {name: feature for name, feature in features.items() if name != words and ROLES["tags"].accepts(feature)}
    tags = _role_column("tags", lists, config.label_column)
    if not (tags or config.label_column):
        tags = next((name for name in lists if "tag" in name.lower()), "")
    return f"column '{words}' contains words and '{tags}' one tag per word" if words and tags else ""


def _image_text_retrieval(features: Features, config: DataConfig) -> str:
    captions = _role_column("captions", features, config.text_column)
    if not (_image_columns(features) and captions) or _has_labels(features, config):
        return ""
    return f"images with captions in column '{captions}'"


def _image_text_classification(features: Features, config: DataConfig) -> str:
    if not (_has_role("image", features, config.image_column) and _has_labels(features, config)):
        return ""
    text = config.text_column or usual_column("text", features)
    return f"images, texts in column '{text}', and labels" if text else ""


def _image_classification(features: Features, config: DataConfig) -> str:
    return "images" if _has_role("image", features, config.image_column) else ""


def _text_embedding(features: Features, config: DataConfig) -> str:
    with suppress_logs():
        try:
            _, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
    return "text pairs without labels" if pair and not _has_labels(features, config) else ""


def _text_classification(features: Features, config: DataConfig) -> str:
    with suppress_logs():
        try:
            text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
    # pairs with labels or scores of any column name: classification or regression, not embedding
    return f"text pairs '{text.name}' and '{pair.name}'" if pair else f"texts in column '{text.name}'"


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
"""Task -> function that returns the reason for the task, or "". The first reason wins; tasks that need more columns
come first."""


def _has_labels(features: Features, config: DataConfig) -> bool:
    return bool(config.label_columns) or _has_role("label", features, config.label_column)


def _has_role(role: str, features: Features, configured: str | None) -> bool:
    with suppress_logs():
        try:
            return bool(find_column(role, features, configured))
        except DataError:
            return False


def _image_problems(features: Features, config: DataConfig) -> list[str]:
    try:
        find_column("image", features, config.image_column)
    except DataError as error:
        return error.problems
    return []


def _text_problems(features: Features, config: DataConfig) -> list[str]:
    try:
        find_text_columns(features, config.text_column, config.text_pair_column)
    except DataError as error:
        return error.problems
    return []


def _image_columns(features: Features) -> list[str]:
    return [name for name, feature in features.items() if ROLES["image"].accepts(feature)]


def _role_column(role: str, features: Mapping[str, Any], configured: str | None) -> str:
    """Returns the column of a role by the configuration or by its usual names; "" without such a column."""
    if configured is not None:
        return configured if configured in features and ROLES[role].accepts(features[configured]) else ""
    return usual_column(role, features) or ""
