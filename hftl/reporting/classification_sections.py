"""Sections about rows with one class each: classes, confusion, calibration, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl.evaluation.calibration import Calibration, fit_temperature
from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Gallery, Measured, Note, Section, Table
from hftl.reporting.examples import worst_errors
from hftl.reporting.run_record import RunRecord
from hftl.reporting.run_view import CLASSES_LISTED, Run
from hftl.statistics.confidence_intervals import wilson

_FIT_VALUES = 10_000_000
"""Probabilities that a temperature is fitted on."""


def classes(run: Run) -> Section | None:
    """Precision, recall and F1 of each class."""
    record, split = run.record, run.record.main_split
    if split not in record.judged:
        return None
    counts = record.judged[split].confusion
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    seen = np.nonzero(true + predicted)[0]
    lowest = len(seen) > 20
    order = seen[np.argsort(f1[seen], kind="stable")][:CLASSES_LISTED] if lowest else seen
    table: list[list[Cell]] = [
        [
            record.classes[k],
            int(k),
            int(true[k]),
            int(predicted[k]),
            _share(right[k], predicted[k]),
            _share(right[k], true[k]),
            float(f1[k]),
        ]
        for k in order
    ]
    caption = f"Classes of {split}" + (", lowest F1 first" if lowest else "")
    caption += f" ({len(order)} of {len(seen)})" if len(order) < len(seen) else f" ({len(seen)})"
    head = ["class", "number", "rows", "predicted", "precision", "recall", "F1"]
    blocks: list[Any] = [Table(caption, head, table)]
    absent = len(record.classes) - len(seen)
    if absent:
        blocks.append(Note(f"{absent} class(es) have no row in {split} and were never predicted: they are left out."))
    return Section("Classes", blocks)


def confusion_section(run: Run) -> Section | None:
    """The matrix, and the pairs that are taken for each other most."""
    record, split = run.record, run.record.main_split
    if split not in record.judged:
        return None
    counts, names = record.judged[split].confusion, record.classes
    wrong = counts - np.diag(counts.diagonal())
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:20]
    table: list[list[Cell]] = []
    for true, predicted in zip(*np.unravel_index(pairs, wrong.shape), strict=True):
        count, rows = int(wrong[true, predicted]), int(counts[true].sum())
        if count:
            table.append([names[true], names[predicted], count, Measured(count / rows, wilson(count, rows))])
    alt = f"Confusion matrix of {split}: {int(counts.trace())} of {int(counts.sum())} rows on the diagonal"
    caption = f"{split}, {int(counts.sum()):,} rows; colour: share of the true class"
    if len(names) > 24:
        caption += " (its square root); axes: class numbers, as in the table of classes"
    drawn = Figures([Figure(figures.confusion_heatmap(counts, names, alt), caption, wide=True)])
    listed = Table("Most confused", ["true class", "taken for", "rows", "of the true class"], table)
    return Section("Confusion", [drawn, listed if table else Note("No row was confused.")])


def calibration(run: Run) -> Section | None:
    """Reliability before and after temperature scaling."""
    record, split = run.record, run.record.main_split
    if split is None:
        return None
    before = _calibration(record, split, 1.0)
    if not before.rows:
        return None
    found, notes, temperature = {"as trained": before}, [], None
    if split == "test" and "validation" in record.splits:
        temperature, said = _temperature(record)
        notes.append(Note(said))
        if temperature:
            found[f"temperature {temperature:.2f}"] = _calibration(record, split, temperature)
    else:
        notes.append(Note("No temperature is fitted: that takes a validation split beside the one that is measured."))
    scores = {name: made.compute() for name, made in found.items()}
    table = [[name, *(score[key] for key in ("ece", "nll", "brier"))] for name, score in scores.items()]
    said = "; ".join(f"{name}: ECE {score['ece']:.3f}" for name, score in scores.items())
    drawn = figures.reliability(found, f"Reliability diagram of {split}. {said}")
    caption = f"{split}: accuracy in 15 bins of confidence, larger marks for more rows; lines: 95 % Wilson intervals"
    about = (
        "ECE: mean distance between confidence and accuracy over the bins (Guo et al. 2017); it is above 0 even for a "
        "perfect model, the more so the fewer rows. NLL: mean negative log-likelihood. Brier: squared distance of the "
        "probabilities from the true class, summed over classes, 0 to 2. Lower is better in all."
    )
    listed = Table(f"Calibration on {split}", ["probabilities", "ECE", "NLL", "Brier"], table)
    return Section("Calibration", [Figures([Figure(drawn, caption)]), listed, *notes, Note(about)])


def _calibration(record: RunRecord, split: str, temperature: float) -> Calibration:
    made = Calibration(temperature)
    for probabilities, labels in record.probabilities(split):
        made.update(probabilities, labels)
    return made


def _temperature(record: RunRecord) -> tuple[float | None, str]:
    """Returns the temperature fitted on validation, and a sentence about it."""
    limit = max(_FIT_VALUES // max(len(record.classes), 1), 1)
    rows = len(record.judged["validation"].labels) if "validation" in record.judged else 0
    every = -(-rows // limit) or 1
    kept: list[Any] = []
    place = 0
    for probabilities, labels in record.probabilities("validation"):
        first = -place % every
        kept.append((probabilities[first::every], labels[first::every]))
        place += len(labels)
    if not kept:
        return None, "No temperature is fitted: there are no probabilities of validation rows."
    probabilities, labels = (np.concatenate(part) for part in zip(*kept, strict=True))
    temperature = fit_temperature(probabilities, labels)
    on = f"{len(labels):,} validation rows"
    if temperature is None:
        return None, f"No temperature is fitted: all {on} are right, so none is best."
    wrong = int((probabilities.argmax(1) != labels).sum())
    surer = "surer than it is right" if temperature > 1 else "less sure than it is right"
    return temperature, (
        f"Temperature {temperature:.3f} has the least NLL on {on} ({wrong} of them wrong): on these the model is "
        f"{surer}. To use it, divide the logits by it; predictions stay the same."
    )


def errors(run: Run) -> Section | None:
    """The wrong rows that the model was surest of, or furthest from the truth in, shown."""
    record, split = run.record, run.record.main_split
    if split is None or split not in record.answers:
        return None
    chosen, count, how = worst_errors(record, split)
    title, rows = f"{'Most confident' if split in record.judged else 'Largest'} errors", len(record.answers[split].rows)
    if not count:
        return Section(title, [Note(f"All {rows:,} rows of {split} are right.")])
    blocks: list[Any] = [Note(f"{len(chosen)} of {count:,} errors in {rows:,} rows of {split}, {how} first.")]
    if run.rows.missing:
        blocks.append(Note(run.rows.missing, warning=True))
    return Section(title, [*blocks, Gallery(run.rows.examples(split, chosen))])


def _share(part: Any, whole: Any) -> Measured:
    return Measured(float(part / whole), wilson(int(part), int(whole))) if whole else Measured(None)
