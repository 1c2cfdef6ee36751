"""Labels as classes, and what is wrong with how they are shared out."""

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
"""A class with fewer training rows is rare."""
UNEVEN = 10.0
"""How many times larger than the smallest class the largest may be."""
_SHIFTED = 0.1
"""Total variation distance between the classes of two splits that is worth a sentence."""
_MANY_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """The class of every row of all splits."""

    codes: Any
    """[N] int64, -1 where there is none."""
    names: list[str]
    """Of the K classes."""
    known: int
    """Classes that train or the data set names; those after it stand in held-out splits alone."""
    why_not: str = ""
    """Why labels are no classes, as the end of a sentence; empty where they are."""


def read_labels(splits: Splits, numbering: Numbering, task: Task | None = None) -> Labels:
    """Returns the labels of all splits as classes; data without such labels are no error.

    Args:
        splits: All rows.
        numbering: Of their rows.
        task: The task that the splits are for; without one, their label column decides.
    """
    none = Labels(np.full(len(numbering), -1, np.int64), [], 0)
    train, config = splits["train"], splits.config
    unfit = unsupported(task, Capability.CLASS_CHECKS) if task is not None else ""
    if unfit:
        return replace(none, why_not=unfit.rstrip("."))
    if config.label_columns or config.label_separator:
        return replace(none, why_not="a row may have several labels, or numbers")
    try:
        with suppress_logs():
            column = find_column("label", train.features, config.label_column).name
    except DataError as error:
        return replace(none, why_not=f"no label column is known ({error.problems[0]})")
    import pyarrow as pa

    kind = arrow_column(train, column).type
    if pa.types.is_nested(kind):
        return replace(none, why_not=f"column '{column}' holds several labels in each row")
    with suppress_logs():
        problem, why = choose_problem(splits)
        target = SingleLabelTarget.find(replace(splits, lenient=True))
    if Capability.CLASS_CHECKS not in target_info(TARGETS[problem]).capabilities:
        return replace(none, why_not=f"labels are no classes ({why})")
    if len(target.names) > max(_MANY_CLASSES, len(train) / 2):
        return replace(none, why_not=f"column '{column}' has {len(target.names):,} different values, too many to learn")
    names, ids, codes = list(target.names), dict(target.ids), none.codes
    missing = splits_missing(target, splits)
    for split, rows in splits.items():
        if column not in rows.features:
            continue
        place = numbering.of_split(split)
        for row, value in enumerate(arrow_column(rows, column).to_pylist()):
            if row in missing[split]:
                continue
            if value not in ids:
                ids[value] = len(names)
                names.append(str(value))
            codes[place.start + row] = ids[value]
    return Labels(codes, names, len(target.names))


def splits_missing(target: SingleLabelTarget, splits: Splits) -> dict[str, set[int]]:
    """Returns the rows of each split that have no label."""
    return {
        split: {row for row, bad in found.items() if bad.reason == "no label"}
        for split, found in target.invalid_rows(splits).items()
    }


def unlabelled(labels: Labels, numbering: Numbering) -> Finding:
    """Returns the rows without a label, and the held-out rows of classes that train lacks."""
    if labels.why_not:
        return Finding("unlabelled", f"Not looked for: {labels.why_not}.", looked=False)
    train = labels.codes[numbering.of_split("train")]
    present = np.bincount(train[train >= 0], minlength=len(labels.names) + 1) > 0
    entries = []
    for number in np.flatnonzero((labels.codes < 0) | ~present[labels.codes]).tolist():
        code = labels.codes[number]
        why = "no label" if code < 0 else f"class '{labels.names[code]}', of which train has no row"
        entries.append(Entry(*numbering.address(number), why))
    return Finding("unlabelled", "No model can learn from these rows, or be right about them.", tuple(entries))


def class_counts(labels: Labels, numbering: Numbering) -> dict[str, Any]:
    """Returns the number of rows of each class [K] by split."""
    counts = {}
    for split in numbering.splits:
        codes = labels.codes[numbering.of_split(split)]
        counts[split] = np.bincount(codes[codes >= 0], minlength=len(labels.names))
    return counts


def imbalance(labels: Labels, numbering: Numbering) -> Finding:
    """Returns what is uneven about the classes: rare, missing, or shared out differently in the splits."""
    if labels.why_not:
        return Finding("class_imbalance", f"Not looked for: {labels.why_not}.", looked=False)
    counts = class_counts(labels, numbering)
    train = counts["train"][: labels.known]
    problems = []
    if (train > 0).sum() < 2:
        problems.append("train has fewer than two classes; there is nothing to tell apart.")
    absent = [name for name, count in zip(labels.names, train, strict=False) if not count]
    if absent:
        problems.append(f"train has no row of {len(absent)} class(es): {shorten(absent)}.")
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
    for split, held in counts.items():
        if split != "train" and held.sum() and train.sum():
            problems += _shift(split, held, counts["train"])
    sentence = (
        f"Told of: a class with fewer than {FEW} training rows; a largest class {UNEVEN:g} times the smallest; classes "
        f"shared out differently from train (total variation distance over {_SHIFTED:g}, which chance makes of equal "
        "shares in fewer than 1 of 1,000 cases by a chi-squared test)."
    )
    return Finding("class_imbalance", sentence, problems=tuple(problems))


def _shift(split: str, held: Any, train: Any) -> list[str]:
    from scipy.stats import chi2_contingency

    distance = float(np.abs(held / held.sum() - train / train.sum()).sum() / 2)
    both = np.stack([held, train])[:, (held + train) > 0]
    if distance <= _SHIFTED or both.shape[1] < 2:
        return []
    _, probability, *_ = chi2_contingency(both)
    if float(probability) >= 1e-3:  # pyright: ignore[reportArgumentType]
        return []
    return [f"the classes of {split} are shared out differently from those of train (distance {distance:.2f} of 1)."]
