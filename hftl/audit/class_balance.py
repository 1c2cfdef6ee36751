"""Class labels of all rows, missing labels and class imbalance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hftl.audit.finding import Entry, Finding, Numbering
from hftl.data.columns import arrow_column, find_column
from hftl.data.splits import Splits
from hftl.errors import DataError, shorten
from hftl.logging import suppress_logs
from hftl.tasks.capabilities import Capability, target_info
from hftl.tasks.registry import unsupported
from hftl.tasks.targets.label_target import TARGETS, choose_problem
from hftl.tasks.targets.single_label.target import SingleLabelTarget
from hftl.tasks.task import Task

FEW = 5
"""Classes with fewer training rows count as rare."""
UNEVEN = 10.0
"""Minimum reported ratio of the largest to the smallest class."""
_SHIFTED = 0.1
"""Reported total variation distance between the class distributions of two splits, above this value."""
_MANY_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """The class of every row of all splits."""

    codes: Any
    """Class of each row, [N] int64; -1 for rows without a label."""
    names: list[str]
    """Names of the K classes."""
    known: int
    """Number of classes in train or the dataset; classes after it occur in held-out splits only."""
    why_not: str = ""
    """Reason why the labels are not single-label classes; empty if they are."""


def read_labels(splits: Splits, numbering: Numbering, task: Task | None = None) -> Labels:
    """Returns the labels of all splits as classes; `why_not` gives the reason for data without class labels.

    Args:
        splits: All rows.
        numbering: Row numbers over all splits.
        task: Task of the splits; None detects the label type from the label column.
    """
    no_labels = Labels(np.full(len(numbering), -1, np.int64), [], 0)
    train, config = splits["train"], splits.config
    problem = unsupported(task, Capability.CLASS_CHECKS) if task is not None else ""
    if problem:
        return replace(no_labels, why_not=problem.rstrip("."))
    if config.label_columns or config.label_separator:
        return replace(no_labels, why_not="labels are multi-label or regression targets")
    try:
        with suppress_logs():
            column = find_column("label", train.features, config.label_column).name
    except DataError as error:
        return replace(no_labels, why_not=f"no label column is known ({error.problems[0]})")
    import pyarrow as pa

    if pa.types.is_nested(arrow_column(train, column).type):
        return replace(no_labels, why_not=f"column '{column}' is multi-label")
    with suppress_logs():
        problem_type, reason = choose_problem(splits)
        target = SingleLabelTarget.find(replace(splits, lenient=True))
    if Capability.CLASS_CHECKS not in target_info(TARGETS[problem_type]).capabilities:
        return replace(no_labels, why_not=f"labels are not classes ({reason})")
    if len(target.names) > max(_MANY_CLASSES, len(train) / 2):
        return replace(
            no_labels, why_not=f"column '{column}' has {len(target.names):,} distinct values, too many for classes"
        )
    names, ids, codes = list(target.names), dict(target.ids), no_labels.codes
    missing = splits_missing(target, splits)
    for split, rows in splits.items():
        if column not in rows.features:
            continue
        start = numbering.of_split(split).start
        for row, value in enumerate(arrow_column(rows, column).to_pylist()):
            if row in missing[split]:
                continue
            if value not in ids:
                ids[value] = len(names)
                names.append(str(value))
            codes[start + row] = ids[value]
    return Labels(codes, names, len(target.names))


def splits_missing(target: SingleLabelTarget, splits: Splits) -> dict[str, set[int]]:
    """Returns the rows without a label, by split."""
    return {
        split: {row for row, invalid in invalid_rows.items() if invalid.reason == "no label"}
        for split, invalid_rows in target.invalid_rows(splits).items()
    }


def unlabelled(labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows without a label, and the held-out rows of classes missing from train."""
    if labels.why_not:
        return Finding("unlabelled", f"Not checked: {labels.why_not}.", checked=False)
    train = labels.codes[numbering.of_split("train")]
    present = np.bincount(train[train >= 0], minlength=len(labels.names) + 1) > 0
    entries = []
    for number in np.flatnonzero((labels.codes < 0) | ~present[labels.codes]).tolist():
        code = labels.codes[number]
        why = "no label" if code < 0 else f"class '{labels.names[code]}' is missing from train"
        entries.append(Entry(*numbering.address(number), why))
    return Finding("unlabelled", "These rows cannot be used for training or metrics.", tuple(entries))


def class_counts(labels: Labels, numbering: Numbering) -> dict[str, Any]:
    """Returns the number of rows per class, [K], by split."""
    counts = {}
    for split in numbering.splits:
        codes = labels.codes[numbering.of_split(split)]
        counts[split] = np.bincount(codes[codes >= 0], minlength=len(labels.names))
    return counts


def class_imbalance(labels: Labels, numbering: Numbering) -> Finding:
    """Returns rare and missing classes, a large class ratio, and class distributions that differ between splits."""
    if labels.why_not:
        return Finding("class_imbalance", f"Not checked: {labels.why_not}.", checked=False)
    counts = class_counts(labels, numbering)
    train = counts["train"][: labels.known]
    problems = []
    if (train > 0).sum() < 2:
        problems.append("train has fewer than two classes.")
    absent = [name for name, count in zip(labels.names, train, strict=False) if not count]
    if absent:
        problems.append(f"train lacks {len(absent)} class(es): {shorten(absent)}.")
    few = [f"{name} ({count})" for name, count in zip(labels.names, train, strict=False) if 0 < count < FEW]
    if few:
        problems.append(f"{len(few)} class(es) have fewer than {FEW} training rows: {shorten(few)}.")
    present = train[train > 0]
    if len(present) > 1 and present.max() >= UNEVEN * present.min():
        problems.append(
            f"the largest class of train ({labels.names[int(train.argmax())]}, {present.max():,} rows) is "
            f"{present.max() / present.min():.0f} times the smallest "
            f"({labels.names[int(np.where(train > 0, train, train.max() + 1).argmin())]}, {present.min():,})."
        )
    for split, held_out in counts.items():
        if split != "train" and held_out.sum() and train.sum():
            problems += _distribution_shift(split, held_out, counts["train"])
    description = (
        f"Reported: classes with fewer than {FEW} training rows; a largest class of at least {UNEVEN:g} times the "
        f"smallest; class distributions that differ from train (total variation distance above {_SHIFTED:g}, "
        "chi-squared test with p < 0.001)."
    )
    return Finding("class_imbalance", description, problems=tuple(problems))


def _distribution_shift(split: str, held_out: Any, train: Any) -> list[str]:
    from scipy.stats import chi2_contingency

    distance = float(np.abs(held_out / held_out.sum() - train / train.sum()).sum() / 2)
    both = np.stack([held_out, train])[:, (held_out + train) > 0]
    if distance <= _SHIFTED or both.shape[1] < 2:
        return []
    _, probability, *_ = chi2_contingency(both)
    if float(probability) >= 1e-3:  # pyright: ignore[reportArgumentType]
        return []
    return [f"the class distribution of {split} differs from train (total variation distance {distance:.2f})."]
