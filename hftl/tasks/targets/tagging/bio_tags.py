"""Word tags (BIO and its variants) and the entities that they encode.

Entities are decoded as in conlleval (Tjong Kim Sang 2000, https://www.clips.uantwerpen.be/conll2000/chunking/), the
default of seqeval: a tag that cannot continue the entity of the previous word starts a new entity. Every sequence of
tags is valid, and one rule decodes BIO, IOB1 and IOBES.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hftl.data.columns import Column, arrow_column, find_column
from hftl.data.roles import ROLES, usual_column
from hftl.data.splits import Splits
from hftl.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

OUTSIDE = "O"
_PREFIXED = re.compile(r"([BIMESLU])-(.+)", re.DOTALL)
_STARTS, _ENDS = frozenset("BSU"), frozenset("ESLU")
"""Prefixes of the first and of the last word of an entity."""


@dataclass(frozen=True)
class Entity:
    """Entity of a row: its type, its first word, and the index after its last word."""

    type: str
    first: int
    end: int


@dataclass(frozen=True)
class TagScheme:
    """Tags of a dataset and their scheme.

    Attributes:
        tags: Tag names, in the order of the outputs.
        scheme: `BIO`, `IOBES`, or `plain` for tags without prefix. In `plain`, adjacent words with equal tags form one
            entity; without the tag `O` (part-of-speech tags) each word is one entity.
        parts: Prefix and type of each tag; None for `O`.
        types: Entity types, sorted.
    """

    tags: tuple[str, ...]
    scheme: str
    parts: tuple[tuple[str, str] | None, ...]
    types: tuple[str, ...]

    @classmethod
    def from_tags(cls, tags: Sequence[str]) -> TagScheme:
        """Returns the scheme of tag names."""
        inside = [tag for tag in tags if tag != OUTSIDE]
        matches = [_PREFIXED.fullmatch(tag) for tag in inside]
        if inside and all(matches):
            parts = {tag: (match[1], match[2]) for tag, match in zip(inside, matches, strict=True) if match}
            scheme = "IOBES" if any(prefix in _ENDS for prefix, _ in parts.values()) else "BIO"
        else:
            parts, scheme = {tag: ("I" if OUTSIDE in tags else "S", tag) for tag in inside}, "plain"
        types = tuple(sorted({entity_type for _, entity_type in parts.values()}))
        return cls(tuple(tags), scheme, tuple(parts.get(tag) for tag in tags), types)

    def entities(self, tag_ids: Sequence[int]) -> list[Entity]:
        """Returns the entities of a row in order, from one tag index per word."""
        entities: list[Entity] = []
        previous: tuple[str, str] | None = None
        first = 0
        for word, tag_id in enumerate([*tag_ids, -1]):
            current = self.parts[tag_id] if tag_id >= 0 else None
            if previous is not None and not _continues(previous, current):
                entities.append(Entity(previous[1], first, word))
            if current is not None and not _continues(previous, current):
                first = word
            previous = current
        return entities

    def count_invalid_transitions(self, tag_ids: Sequence[int]) -> int:
        """Returns the number of words that continue an entity without a preceding word of it (`I-` after `O`)."""
        count = 0
        previous: tuple[str, str] | None = None
        for tag_id in tag_ids:
            current = self.parts[tag_id]
            if self.scheme != "plain" and current is not None and current[0] not in _STARTS:
                count += not _continues(previous, current)
            previous = current
        return count

    def count_begin_tags(self, tag_ids: Sequence[int]) -> tuple[int, int]:
        """Returns the number of `B-` tags, and of those after a word of the same type.

        In IOB1 both are equal: an entity starts with `I-` unless the previous word has the same type.
        """
        begin_tags = after_same_type = 0
        previous: tuple[str, str] | None = None
        for tag_id in tag_ids:
            current = self.parts[tag_id]
            if current is not None and current[0] == "B":
                begin_tags += 1
                after_same_type += previous is not None and previous[1] == current[1]
            previous = current
        return begin_tags, after_same_type


def _continues(previous: tuple[str, str] | None, current: tuple[str, str] | None) -> bool:
    """Whether adjacent tags are part of one entity."""
    if previous is None or current is None:
        return False
    return previous[1] == current[1] and previous[0] not in _ENDS and current[0] not in _STARTS


def find_tags(features: Features, label_column: str | None) -> Column:
    """Returns the tag column: `data.label_column`, a usual name, or the only list with "tag" in its name.

    Raises:
        DataError: No column fits, or several fit equally well.
    """
    if label_column is None and usual_column("tags", features) is None:
        lists = [name for name, kind in features.items() if ROLES["tags"].accepts(kind) and "tag" in name.lower()]
        if len(lists) == 1:
            return Column(lists[0], "the only list with 'tag' in its name")
    return find_column("tags", features, label_column)


def tag_names(splits: Splits, column: str) -> tuple[list[str], str]:
    """Returns the tag names in the order of their indices, and the origin of the names.

    Raises:
        DataError: The column does not hold tags.
    """
    train, file_names = splits["train"], splits.class_names
    feature = train.features[column]
    inner = getattr(feature, "feature", feature)
    if type(inner).__name__ == "ClassLabel" and inner is not feature:
        return list(inner.names), "named by the dataset"
    type_name = str(getattr(inner, "dtype", ""))
    if inner is feature and "string" not in type_name or not ("int" in type_name or "string" in type_name):
        raise DataError(
            f"data.label_column: '{column}' holds {type(feature).__name__} of {type_name or type(inner).__name__}; "
            "allowed: lists of tag names or tag numbers, strings of tag names. Set another column."
        )
    values: set[Any] = {
        tag
        for split in splits.labelled_by_source
        for tags in arrow_column(splits[split], column).to_pylist()
        for tag in (tags.split() if isinstance(tags, str) else tags or ())
        if tag is not None
    }
    if "int" in type_name:
        if file_names and all(0 <= value < len(file_names) for value in values):
            return list(file_names), "named in labels.json"
        return [str(number) for number in range(max(values, default=0) + 1)], "without names"
    if file_names and values <= set(file_names):
        return list(file_names), "in the order of labels.json"
    return sorted(values, key=lambda tag: (tag != OUTSIDE, tag.partition("-")[2], tag)), "from train"
