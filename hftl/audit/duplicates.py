"""Duplicates within a split, leaks across splits, and conflicting labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl.audit.class_balance import Labels
from hftl.audit.finding import Entry, Finding, Numbering, format_counts


class Groups:
    """Groups of rows with equal keys.

    Args:
        keys: Keys of the normalized inputs, [N].
        verbatim: Keys of the inputs without normalization, [N].
        usable: Whether each row has a key, [N] bool.
        verbatim_is: Name of a match of `verbatim` keys in messages ("exact copy").
    """

    def __init__(self, keys: Any, verbatim: Any, usable: Any, verbatim_is: str) -> None:
        self.keys, self.verbatim, self.usable, self.verbatim_is = keys, verbatim, usable, verbatim_is
        numbers = np.flatnonzero(usable)
        _, first, inverse = np.unique(keys[numbers], return_index=True, return_inverse=True)
        self.first = np.arange(len(keys))
        """First row number of the group of each row, [N]; the row's own number without a group."""
        self.first[numbers] = numbers[first][inverse]
        shared = numbers[np.bincount(inverse)[inverse] > 1]
        order = shared[np.argsort(self.first[shared], kind="stable")]
        boundaries = np.flatnonzero(np.diff(self.first[order])) + 1
        self.groups = np.split(order, boundaries) if len(order) else []
        """Row numbers of each group with at least two rows, sorted."""

    def closest(self, number: int, others: Any) -> int:
        """Returns the first exact copy of a row among `others`, else the first of them."""
        exact = others[self.verbatim[others] == self.verbatim[number]]
        return int(exact[0] if len(exact) else others[0])

    def is_verbatim(self, first: int, second: int) -> bool:
        """Whether two rows are equal without normalization."""
        return bool(self.verbatim[first] == self.verbatim[second])


def leaks(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the held-out rows that also occur in an earlier split (order: train, validation, test).

    A row that occurs in two earlier splits counts once, for the first of them.
    """
    entries = []
    counts: Counter[tuple[str, str]] = Counter()
    exact: Counter[tuple[str, str]] = Counter()
    for group in groups.groups:
        split_indices = numbering.split_of(group)
        earliest = group[split_indices == split_indices[0]]
        for number in group[split_indices > split_indices[0]].tolist():
            entry = _entry(groups, labels, numbering, number, earliest)
            entries.append(entry)
            pair = entry.split, numbering.splits[split_indices[0]]
            counts[pair] += 1
            exact[pair] += groups.is_verbatim(number, groups.closest(number, earliest))
    entries.sort(key=lambda entry: (-numbering.splits.index(entry.split), entry.row))
    summary = "; ".join(
        f"{format_counts({split: count})} in {earlier} ({exact[split, earlier]:,} of them: {groups.verbatim_is})"
        for (split, earlier), count in sorted(counts.items())
    )
    description = f"Metrics on leaked rows are optimistic. {_METHOD}"
    return Finding("leaks", description, tuple(entries), summary=summary)


def duplicates(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows that repeat an earlier row of the same split."""
    entries = []
    for group in groups.groups:
        split_indices = numbering.split_of(group)
        for index in np.unique(split_indices):
            in_split = group[split_indices == index]
            for position in range(1, len(in_split)):
                entries.append(_entry(groups, labels, numbering, int(in_split[position]), in_split[:position]))
    entries.sort(key=lambda entry: (numbering.splits.index(entry.split), entry.row))
    description = f"Duplicates have twice the weight in training or metrics. {_METHOD}"
    return Finding("duplicates", description, tuple(entries))


def conflicting_labels(groups: Groups, labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows that have the same input as another row and a different label."""
    if labels.why_not:
        return Finding("conflicting_labels", f"Not checked: {labels.why_not}.", checked=False)
    entries = []
    for group in conflicting(groups, labels):
        for number in group.tolist():
            conflict = int(next(each for each in group if labels.codes[each] != labels.codes[number]))
            split, row = numbering.address(conflict)
            why = f"label {_label(labels, number)}; label of {split} row {row}: {_label(labels, conflict)}"
            entries.append(Entry(*numbering.address(number), why, (split, row)))
    return Finding("conflicting_labels", f"At most one of the labels is correct. {_METHOD}", tuple(entries))


def conflicting(groups: Groups, labels: Labels) -> list[Any]:
    """Returns the labeled rows of each group with more than one label."""
    labeled = [group[labels.codes[group] >= 0] for group in groups.groups]
    return [group for group in labeled if len(np.unique(labels.codes[group])) > 1]


def near_duplicates(
    pairs: Sequence[tuple[int, int, float]], labels: Labels, numbering: Numbering, method: str, across: bool
) -> Finding:
    """Returns near-duplicate rows, the most similar first.

    Args:
        pairs: Two row numbers and their similarity in [0, 1].
        labels: Labels of all rows.
        numbering: Row numbers over all splits.
        method: Definition of the similarity.
        across: Whether to return pairs across splits, else pairs within a split.
    """
    entries = []
    for first, second, similarity in sorted(pairs, key=lambda pair: (-pair[2], pair[:2])):
        first, second = min(first, second), max(first, second)
        if (numbering.split_of(first) != numbering.split_of(second)) == across:
            split, row = numbering.address(first)
            why = f"similarity {similarity:.2f} to {split} row {row}{_label_difference(labels, second, first)}"
            entries.append(Entry(*numbering.address(second), why, (split, row), round(similarity, 4)))
    return Finding("near_leaks" if across else "near_duplicates", method, tuple(entries))


_METHOD = (
    "Texts are compared after normalization of Unicode form (NFKC), case, whitespace and punctuation, pairs in order; "
    "images by their decoded pixels."
)


def _entry(groups: Groups, labels: Labels, numbering: Numbering, number: int, others: Any) -> Entry:
    closest = groups.closest(number, others)
    split, row = numbering.address(closest)
    match = groups.verbatim_is if groups.is_verbatim(number, closest) else "duplicate"
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    why = f"{match} of {split} row {row}{more}{_label_difference(labels, number, closest)}"
    return Entry(*numbering.address(number), why, (split, row))


def _label_difference(labels: Labels, first: int, second: int) -> str:
    codes = labels.codes[first], labels.codes[second]
    if min(codes) < 0 or codes[0] == codes[1]:
        return ""
    return f"; labels differ: {_label(labels, first)} and {_label(labels, second)}"


def _label(labels: Labels, number: int) -> str:
    return f"'{labels.names[labels.codes[number]]}'"
