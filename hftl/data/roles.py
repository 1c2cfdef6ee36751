"""Table of column roles: the types that a role accepts, the usual names of its columns, and the setting that names one.

Readers of columns and `task: auto` share this table, so both find the same columns.
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
"""Usual names of the fields of a column of objects, in order of precedence."""
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
    """What a column is used for.

    Attributes:
        name: Key in `ROLES`.
        accepts: Whether a column of a type (an item of `datasets.Features`) can have the role.
        usual_names: In lower case, in order of precedence.
        setting: Field of `data` that names the column.
    """

    name: str
    accepts: Callable[[Any], bool]
    usual_names: tuple[str, ...]
    setting: str


def usual_columns(role: str, features: Mapping[str, Any]) -> list[str]:
    """Returns the columns with a usual name of a role, whatever its case, and a type that the role accepts.

    Args:
        role: Key in `ROLES`.
        features: Types of the columns by name.

    Returns:
        Names in order of precedence.
    """
    known = ROLES[role]
    fitting: dict[str, str] = {}
    for name, kind in features.items():
        if known.accepts(kind):
            fitting.setdefault(name.lower(), name)
    return [fitting[usual] for usual in known.usual_names if usual in fitting]


def usual_column(role: str, features: Mapping[str, Any]) -> str | None:
    """Returns the first of `usual_columns`, or None."""
    return next(iter(usual_columns(role, features)), None)


def is_usual_name(role: str, name: str) -> bool:
    """Whether columns of `role` are usually called `name`, whatever its case."""
    return name.lower() in ROLES[role].usual_names


def usual_pair(features: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the first two columns whose names are usual for text pairs, whatever their case."""
    names: dict[str, str] = {}
    for name in features:
        names.setdefault(name.lower(), name)
    return next(((names[a], names[b]) for a, b in TEXT_PAIRS if a in names and b in names), None)


def type_name(kind: Any) -> str:
    """Returns a column's type in one word: a dtype, the name of a feature class, or `nested`."""
    if isinstance(kind, (list, Mapping)):
        return "nested"
    return str(kind.dtype) if type(kind).__name__ == "Value" else type(kind).__name__


def item_type(kind: Any) -> Any:
    """Returns the type of a list's items; None for other types."""
    return kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)


def _is_image(kind: Any) -> bool:
    return type_name(kind) == "Image"  # columns of paths are images by now, where their paths may be opened


def _is_text(kind: Any) -> bool:
    return type_name(kind) in _STRINGS


def _is_text_or_list(kind: Any) -> bool:
    return _is_text(kind) or _is_text(item_type(kind))


def _is_label(kind: Any) -> bool:
    name = type_name(kind)
    plain = name in ("ClassLabel", *_STRINGS, "bool", "float32", "float64") or "int" in name
    return plain or type_name(getattr(kind, "feature", None)) in _LABEL_ITEMS


def _is_words(kind: Any) -> bool:
    return type_name(kind) in ("List", "LargeList") and _is_text(kind.feature)


def _is_tags(kind: Any) -> bool:
    return type_name(kind) in ("List", "LargeList") and _is_label(kind.feature)


def _is_answers(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind)
    return isinstance(inner, Mapping) and {"text", "answer_start"} <= set(inner)


def _is_objects(kind: Any) -> bool:
    fields = kind if isinstance(kind, Mapping) else item_type(kind)
    needed = (OBJECT_FIELDS["box"], OBJECT_FIELDS["category"])
    return isinstance(fields, Mapping) and all(any(name in fields for name in names) for names in needed)


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
        # how similar the texts of a pair are
        Role("score", _is_label, _SCORES, "label_column"),
        Role("captions", _is_text_or_list, _CAPTIONS, "text_column"),
        # whether image and caption of a row belong together, 1 or 0
        Role("match", _is_label, ("label", "match", "matches"), "label_column"),
    )
}
