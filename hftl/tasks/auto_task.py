"""Which task fits some data, where nobody has named one: by columns and their types, and said why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.data.columns import NAMES, find_column, find_text_columns
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError, nearest
from hftl.logging import muted, say
from hftl.tasks.registry import TASKS
from hftl.tasks.targets.detection.bounding_boxes import find_objects
from hftl.tasks.targets.segmentation.masks import MASK_NAMES
from hftl.tasks.task import SupervisedTask

if TYPE_CHECKING:
    from datasets import Features

AUTO = "auto"
_CAPTIONS = ("caption", "captions")


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
            say(f"task: {name} ({why})")
            return TASKS[name]
    problems: list[str] = []
    with muted():
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
    images = _images(features)
    given = config.label_column
    masks = [name for name in images if (name == given if given else name.lower() in MASK_NAMES)]
    return f"column '{masks[0]}' holds an image for each image" if len(images) == 2 and len(masks) == 1 else ""


def _question_answering(features: Features, config: DataConfig) -> str:
    wanted = {"question", "context", "answers"}
    return "columns 'question', 'context' and 'answers'" if wanted <= set(features) else ""


def _token_classification(features: Features, config: DataConfig) -> str:
    lists = {name: _inside(kind) for name, kind in features.items()}
    words = [
        name for name, inside in lists.items() if inside == "string" and name in (config.text_column, "tokens", "words")
    ]
    tags = [name for name, inside in lists.items() if inside and (_is_tags(name) or name == config.label_column)]
    return f"column '{words[0]}' holds words and '{tags[0]}' a tag for each" if words and tags else ""


def _is_tags(name: str) -> bool:
    return "tag" in name.lower() or name.lower() in NAMES["tags"]


def _image_text_retrieval(features: Features, config: DataConfig) -> str:
    captions = [name for name in features if name.lower() in _CAPTIONS]
    unlabelled = not _labelled(features, config)
    return f"images with captions in column '{captions[0]}'" if _images(features) and captions and unlabelled else ""


def _image_text_classification(features: Features, config: DataConfig) -> str:
    if not (_found("image", features, config.image_column) and _labelled(features, config)):
        return ""
    texts = [name for name, kind in features.items() if _type(kind) == "string" and name.lower() in NAMES["text"]]
    named = [name for name in (config.text_column,) if name]
    return f"images, texts in column '{(named + texts)[0]}', and labels" if named + texts else ""


def _image_classification(features: Features, config: DataConfig) -> str:
    return "images" if _found("image", features, config.image_column) else ""


def _text_embedding(features: Features, config: DataConfig) -> str:
    with muted():
        try:
            _, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
    return "pairs of texts without labels" if pair and not _labelled(features, config) else ""


def _text_classification(features: Features, config: DataConfig) -> str:
    with muted():
        try:
            text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
        except DataError:
            return ""
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
    with muted():
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
    return [name for name, kind in features.items() if _type(kind) == "Image"]


def _type(kind: Any) -> str:
    if type(kind).__name__ != "Value":
        return type(kind).__name__
    return "string" if kind.dtype == "large_string" else str(kind.dtype)


def _inside(kind: Any) -> str:
    """Returns the type of the items of a column of lists; empty for other columns."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    return _type(inner) if inner is not None else ""
