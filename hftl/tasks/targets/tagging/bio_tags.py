"""Tags of words (BIO and its kin) and the entities that they spell.

Entities are read by the rule of conlleval (Tjong Kim Sang 2000, https://www.clips.uantwerpen.be/conll2000/chunking/),
which seqeval follows by default: a tag that cannot go on from the word before begins an entity of its own. So no
sequence of tags is an error, and BIO, IOB1 and IOBES are all read by one rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
_OPENS, _CLOSES = frozenset("BSU"), frozenset("ESLU")


@dataclass(frozen=True)
class Entity:
    """Words `first` to `end` (not included) of a row are one entity."""

    kind: str
    first: int
    end: int


@dataclass(frozen=True)
class TagReader:
    """What each of the tags of a data set says.

    Attributes:
        tags: In the order of the model's outputs.
        scheme: `BIO`, `IOBES`, or `plain` where tags have no prefix: then words with the same tag that follow each
            other are one entity, or, where no tag is `O` (parts of speech), each word is one.
        parts: Prefix and type of each tag; None outside of entities.
        kinds: The types of entities, sorted.
    """

    tags: tuple[str, ...]
    scheme: str
    parts: tuple[tuple[str, str] | None, ...]
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, tags: Sequence[str]) -> TagReader:
        """Returns the reader of `tags`."""
        inside = [tag for tag in tags if tag != OUTSIDE]
        found = [_PREFIXED.fullmatch(tag) for tag in inside]
        if inside and all(found):
            split = {tag: (match[1], match[2]) for tag, match in zip(inside, found, strict=True) if match}
            scheme = "IOBES" if any(prefix in _CLOSES for prefix, _ in split.values()) else "BIO"
        else:
            split, scheme = {tag: ("I" if OUTSIDE in tags else "S", tag) for tag in inside}, "plain"
        kinds = tuple(sorted({kind for _, kind in split.values()}))
        return cls(tuple(tags), scheme, tuple(split.get(tag) for tag in tags), kinds)

    def entities(self, numbers: Sequence[int]) -> list[Entity]:
        """Returns the entities of a row, in order, from the number of each word's tag."""
        found: list[Entity] = []
        before: tuple[str, str] | None = None
        first = 0
        for word, number in enumerate([*numbers, -1]):
            now = self.parts[number] if number >= 0 else None
            if before is not None and not _goes_on(before, now):
                found.append(Entity(before[1], first, word))
            if now is not None and not _goes_on(before, now):
                first = word
            before = now
        return found

    def out_of_order(self, numbers: Sequence[int]) -> Iterator[int]:
        """Yields the words whose tag goes on with an entity that the word before is not part of (`I-` after `O`)."""
        before: tuple[str, str] | None = None
        for word, number in enumerate(numbers):
            now = self.parts[number]
            if self.scheme != "plain" and now is not None and now[0] not in _OPENS and not _goes_on(before, now):
                yield word
            before = now

    def opens(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Returns how many words have a `B-`, and how many of these follow an entity of the same type.

        In IOB1 all of them do: an entity that follows none of its type begins with `I-`.
        """
        opening = following = 0
        before: tuple[str, str] | None = None
        for number in numbers:
            now = self.parts[number]
            if now is not None and now[0] == "B":
                opening += 1
                following += before is not None and before[1] == now[1]
            before = now
        return opening, following


def _goes_on(before: tuple[str, str] | None, now: tuple[str, str] | None) -> bool:
    """Whether two neighbouring tags belong to one entity."""
    if before is None or now is None:
        return False
    return before[1] == now[1] and before[0] not in _CLOSES and now[0] not in _OPENS


def find_tags(features: Features, given: str | None) -> Column:
    """Returns the column of tags: named by `data.label_column`, by a usual name, or the only list named like "pos_tag".

    Raises:
        DataError: As `find_column`.
    """
    if given is None and usual_column("tags", features) is None:
        lists = [name for name, kind in features.items() if ROLES["tags"].accepts(kind) and "tag" in name.lower()]
        if len(lists) == 1:
            return Column(lists[0], "the only list with 'tag' in its name")
    return find_column("tags", features, given)


def tag_names(splits: Splits, column: str) -> tuple[list[str], str]:
    """Returns the names of the tags in the order of their numbers, and where they come from.

    Raises:
        DataError: The column holds no tags.
    """
    train, beside = splits["train"], splits.class_names
    kind = train.features[column]
    inner = getattr(kind, "feature", kind)
    if type(inner).__name__ == "ClassLabel" and inner is not kind:
        return list(inner.names), "named by the data set"
    type_name = str(getattr(inner, "dtype", ""))
    if inner is kind and "string" not in type_name or not ("int" in type_name or "string" in type_name):
        raise DataError(
            f"data.label_column: '{column}' holds {type(kind).__name__} of {type_name or type(inner).__name__}; tags "
            "are a list for each row, of numbers or of names."
        )
    values: set[Any] = {
        tag
        for split in splits.labelled_by_source
        for tags in arrow_column(splits[split], column).to_pylist()
        for tag in (tags.split() if isinstance(tags, str) else tags or ())
        if tag is not None
    }
    if "int" in type_name:
        if beside and all(0 <= value < len(beside) for value in values):
            return list(beside), "named in labels.json"
        return [str(number) for number in range(max(values, default=0) + 1)], "without names"
    if beside and values <= set(beside):
        return list(beside), "in the order of labels.json"
    in_order = sorted(values, key=lambda tag: (tag != OUTSIDE, tag.partition("-")[2], tag))
    return in_order, "found in train"
