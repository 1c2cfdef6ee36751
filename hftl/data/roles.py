"""Table of column roles: accepted types, usual column names, and the setting that selects a column.

Column detection and `task: auto` share this table and therefore find the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OBJECT_FIELDS: dict[str, tuple[str, ...]] = {
    "box": ("bbox", "boxes", "bboxes", "box"),
    "category": ("category", "categories", "category_id", "label", "labels", "class", "name"),
    "crowd": ("iscrowd", "is_crowd", "crowd"),
}
"""Usual field names of an objects column (bounding boxes), in order of precedence."""
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("anchor", "positive"),
)
"""Usual names of the two columns of a text pair."""
_STRINGS = ("string", "large_string")
_LABEL_ITEMS = ("ClassLabel", *_STRINGS, "int32", "int64")


@dataclass(frozen=True)
class Role:
    """Role of a column.

    Attributes:
        name: Key in `ROLES`.
        accepts: Whether a column type (a value of `datasets.Features`) can have the role.
        usual_names: Usual column names in lower case, in order of precedence.
        setting: Field of `data` that selects the column.
    """

    name: str
    accepts: Callable[[Any], bool]
    usual_names: tuple[str, ...]
    setting: str


def usual_columns(role: str, features: Mapping[str, Any]) -> list[str]:
    """Returns the columns with a usual name of a role (case-insensitive) and an accepted type.

    Args:
        role: Key in `ROLES`.
        features: Types of the columns by name.

    Returns:
        Names in order of precedence.
    """
    by_name: dict[str, str] = {}
    for name, kind in features.items():
        if ROLES[role].accepts(kind):
            by_name.setdefault(name.lower(), name)
    return [by_name[usual] for usual in ROLES[role].usual_names if usual in by_name]


def usual_column(role: str, features: Mapping[str, Any]) -> str | None:
    """Returns the first of `usual_columns`, or None."""
    return next(iter(usual_columns(role, features)), None)


def is_usual_name(role: str, name: str) -> bool:
    """Whether `name` is a usual name of columns of `role` (case-insensitive)."""
    return name.lower() in ROLES[role].usual_names


def usual_pair(features: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the first two columns with usual names of text pairs (case-insensitive), or None."""
    names: dict[str, str] = {}
    for name in features:
        names.setdefault(name.lower(), name)
    return next(((names[a], names[b]) for a, b in TEXT_PAIRS if a in names and b in names), None)


def type_name(kind: Any) -> str:
    """Returns a one-word column type: a dtype, the name of a feature class, or `nested`."""
    if isinstance(kind, (list, Mapping)):
        return "nested"
    return str(kind.dtype) if type(kind).__name__ == "Value" else type(kind).__name__


def item_type(kind: Any) -> Any:
    """Returns the item type of a list, None for other types."""
    return kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)


def _is_image(kind: Any) -> bool:
    return type_name(kind) == "Image"  # `load_splits` has already converted columns of valid paths to images


def _is_text(kind: Any) -> bool:
    return type_name(kind) in _STRINGS


def _is_text_or_list(kind: Any) -> bool:
    return _is_text(kind) or _is_text(item_type(kind))


def _is_label(kind: Any) -> bool:
    name = type_name(kind)
    is_scalar = name in ("ClassLabel", *_STRINGS, "bool", "float32", "float64") or "int" in name
    return is_scalar or type_name(getattr(kind, "feature", None)) in _LABEL_ITEMS


def _is_words(kind: Any) -> bool:
    return type_name(kind) in ("List", "LargeList") and _is_text(kind.feature)


def _is_tags(kind: Any) -> bool:
    return type_name(kind) in ("List", "LargeList") and _is_label(kind.feature)


def _is_answers(kind: Any) -> bool:
    fields = getattr(kind, "feature", kind)
    return isinstance(fields, Mapping) and {"text", "answer_start"} <= set(fields)


def _is_objects(kind: Any) -> bool:
    fields = kind if isinstance(kind, Mapping) else item_type(kind)
    required = (OBJECT_FIELDS["box"], OBJECT_FIELDS["category"])
    return isinstance(fields, Mapping) and all(any(name in fields for name in names) for names in required)


_TEXTS = ("text", "sentence", "content", "document", "review", "question", "utterance", "tweet", "comment")
_CAPTIONS = ("captions", "caption", "sentences", "text", "sentence", "description", "alt_text", "title")
_LABELS = ("label", "labels", "class", "target", "category", "fine_label", "intent", "y", "score", "rating")
_MASKS = ("mask", "masks", "annotation", "segmentation", "seg_map", "semantic", "semantic_mask", "label", "labels",
          "target", "gt")  # fmt: skip
_TAGS = ("ner_tags", "tags", "ner", "labels", "label", "ner_labels", "pos_tags", "upos", "chunk_tags")
_IMAGES = ("image", "img", "picture", "photo", "pixel_values", "image_path", "file_name", "path")
_OBJECTS = ("objects", "annotations", "annotation", "labels", "boxes", "detections")
_SCORES = ("score", "similarity", "similarity_score", "relatedness_score", "label", "labels")

ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("image", _is_image, _IMAGES, "image_column"),
        Role("mask", _is_image, _MASKS, "label_column"),
        Role("objects", _is_objects, _OBJECTS, "label_column"),
        Role("text", _is_text, _TEXTS, "text_column"),
        Role("label", _is_label, _LABELS, "label_column"),
        Role("words", _is_words, ("tokens", "words", "text", "sentence"), "text_column"),
        Role("tags", _is_tags, _TAGS, "label_column"),
        Role("question", _is_text, ("question", "query", "question_text"), "text_column"),
        Role("context", _is_text, ("context", "passage", "paragraph", "document", "text"), "text_pair_column"),
        Role("answers", _is_answers, ("answers", "answer"), "label_column"),
        # similarity of a text pair
        Role("score", _is_label, _SCORES, "label_column"),
        Role("captions", _is_text_or_list, _CAPTIONS, "text_column"),
        # 1 for positive image-caption pairs, 0 for negative ones
        Role("match", _is_label, ("label", "match", "matches"), "label_column"),
    )
}
