"""Rows that are the same as others: within a split, across splits, and with different labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl.audit.class_balance import Labels
from hftl.audit.finding import Entry, Finding, Numbering, format_counts


class Groups:
    """Rows with equal keys.

    Args:
        keys: Of what is compared, [N].
        verbatim: Of the rows as they stand, [N].
        usable: Rows that have a key at all, [N] bool.
        verbatim_is: What equal `verbatim` keys mean ("letter by letter").
    """

    def __init__(self, keys: Any, verbatim: Any, usable: Any, verbatim_is: str) -> None:
        self.keys, self.verbatim, self.usable, self.verbatim_is = keys, verbatim, usable, verbatim_is
        numbers = np.flatnonzero(usable)
        _, first, inverse = np.unique(keys[numbers], return_index=True, return_inverse=True)
        self.first = np.arange(len(keys))
        """Number of the first row of each row's group, [N]; its own where it has no group."""
        self.first[numbers] = numbers[first][inverse]
        shared = numbers[np.bincount(inverse)[inverse] > 1]
        order = shared[np.argsort(self.first[shared], kind="stable")]
        cuts = np.flatnonzero(np.diff(self.first[order])) + 1
        self.groups = np.split(order, cuts) if len(order) else []
        """Numbers of the rows of each group of at least two, in order."""

    def like(self, number: int, others: Any) -> int:
        """Returns the row to show beside a row: the first that is the same as it stands, else the first."""
        same = others[self.verbatim[others] == self.verbatim[number]]
        return int(same[0] if len(same) else others[0])

    def is_verbatim(self, first: int, second: int) -> bool:
        """Whether two rows are the same as they stand."""
        return bool(self.verbatim[first] == self.verbatim[second])


def leaks(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the held-out rows that stand in an earlier split too; train comes before validation, that before test.

    A row that stands in both is counted once, with train.
    """
    entries = []
    counted: Counter[tuple[str, str]] = Counter()
    same: Counter[tuple[str, str]] = Counter()
    for group in groups.groups:
        places = numbering.split_of(group)
        earliest = group[places == places[0]]
        for number in group[places > places[0]].tolist():
            entry = _entry(groups, labels, numbering, number, earliest)
            entries.append(entry)
            pair = entry.split, numbering.splits[places[0]]
            counted[pair] += 1
            same[pair] += entry.why.startswith(groups.verbatim_is)
    entries.sort(key=lambda entry: (-numbering.splits.index(entry.split), entry.row))
    summary = "; ".join(
        f"{format_counts({split: count})} in {other} ({same[split, other]:,} of them {groups.verbatim_is})"
        for (split, other), count in sorted(counted.items())
    )
    sentence = f"A model that has seen a row is not tested by it. {_HOW}"
    return Finding("leaks", sentence, tuple(entries), summary=summary)


def duplicates(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows that repeat an earlier row of their split."""
    entries = []
    for group in groups.groups:
        places = numbering.split_of(group)
        for place in np.unique(places):
            inside = group[places == place]
            for position in range(1, len(inside)):
                entries.append(_entry(groups, labels, numbering, int(inside[position]), inside[:position]))
    entries.sort(key=lambda entry: (numbering.splits.index(entry.split), entry.row))
    return Finding("duplicates", f"Such rows weigh twice, in training or in a metric. {_HOW}", tuple(entries))


def conflicts(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows that are the same as another row and have another label."""
    if labels.why_not:
        return Finding("conflicting_labels", f"Not looked for: {labels.why_not}.", looked=False)
    entries = []
    for group in conflicting(groups, labels):
        for number in group.tolist():
            other = int(next(each for each in group if labels.codes[each] != labels.codes[number]))
            split, row = numbering.address(other)
            why = f"labelled {_name(labels, number)}; {split} row {row} says {_name(labels, other)}"
            entries.append(Entry(*numbering.address(number), why, (split, row)))
    return Finding("conflicting_labels", f"At most one of the labels is right. {_HOW}", tuple(entries))


def conflicting(groups: Groups, labels: Labels) -> list[Any]:
    """Returns the labelled rows of each group that has more than one label."""
    found = [group[labels.codes[group] >= 0] for group in groups.groups]
    return [group for group in found if len(np.unique(labels.codes[group])) > 1]


def near(
    pairs: Sequence[tuple[int, int, float]], labels: Labels, numbering: Numbering, how: str, across: bool
) -> Finding:
    """Returns pairs that are almost the same, those across splits or those within one, the most alike first.

    Args:
        pairs: Numbers of two rows and how alike they are.
        labels: Of all rows.
        numbering: Of all rows.
        how: What the similarity is.
        across: Which of the two.
    """
    entries = []
    for first, second, similarity in sorted(pairs, key=lambda pair: (-pair[2], pair[:2])):
        first, second = min(first, second), max(first, second)
        if (numbering.split_of(first) != numbering.split_of(second)) == across:
            split, row = numbering.address(first)
            why = f"{similarity:.2f} like {split} row {row}{_labels_differ(labels, second, first)}"
            entries.append(Entry(*numbering.address(second), why, (split, row), round(similarity, 4)))
    return Finding("near_leaks" if across else "near_duplicates", how, tuple(entries))


_HOW = (
    "Texts are compared without regard to Unicode form (NFKC), case, blanks and punctuation, pairs in their order; "
    "images by their decoded pixels."
)


def _entry(groups: Groups, labels: Labels, numbering: Numbering, number: int, others: Any) -> Entry:
    other = groups.like(number, others)
    split, row = numbering.address(other)
    how = f"{groups.verbatim_is} the same" if groups.is_verbatim(number, other) else "the same"
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    why = f"{how} as {split} row {row}{more}{_labels_differ(labels, number, other)}"
    return Entry(*numbering.address(number), why, (split, row))


def _labels_differ(labels: Labels, first: int, second: int) -> str:
    codes = labels.codes[first], labels.codes[second]
    if min(codes) < 0 or codes[0] == codes[1]:
        return ""
    return f"; labels differ: {_name(labels, first)} here, {_name(labels, second)} there"


def _name(labels: Labels, number: int) -> str:
    return f"'{labels.names[labels.codes[number]]}'"
