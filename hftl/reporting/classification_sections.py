"""Sections of single-label classification: per-class metrics, confusion matrix, calibration, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl.evaluation.calibration import Calibration, fit_temperature
from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Gallery, Measured, Note, Section, Table
from hftl.reporting.examples import largest_errors
from hftl.reporting.run_record import RunRecord
from hftl.reporting.run_view import MAX_LISTED_CLASSES, Run
from hftl.statistics.confidence_intervals import wilson

_MAX_FIT_VALUES = 10_000_000
"""Maximum number of probabilities for fitting a temperature."""


def per_class_metrics(run: Run) -> Section | None:
    """Returns precision, recall and F1 of each class; None for other tasks."""
    record, split = run.record, run.record.main_split
    if split not in record.class_predictions:
        return None
    counts = record.class_predictions[split].confusion
    correct, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * correct / np.maximum(true + predicted, 1)
    present = np.nonzero(true + predicted)[0]
    is_sorted = len(present) > 20
    order = present[np.argsort(f1[present], kind="stable")][:MAX_LISTED_CLASSES] if is_sorted else present
    table: list[list[Cell]] = [
        [
            record.classes[k],
            int(k),
            int(true[k]),
            int(predicted[k]),
            _fraction(correct[k], predicted[k]),
            _fraction(correct[k], true[k]),
            float(f1[k]),
        ]
        for k in order
    ]
    caption = f"Classes of {split}" + (", lowest F1 first" if is_sorted else "")
    caption += f" ({len(order)} of {len(present)})" if len(order) < len(present) else f" ({len(present)})"
    head = ["class", "number", "rows", "predicted", "precision", "recall", "F1"]
    blocks: list[Any] = [Table(caption, head, table)]
    absent = len(record.classes) - len(present)
    if absent:
        blocks.append(Note(f"{absent} class(es) without rows and predictions in {split} are not listed."))
    return Section("Per-class metrics", blocks)


def confusion_section(run: Run) -> Section | None:
    """Returns the confusion matrix and the most confused pairs of classes; None for other tasks."""
    record, split = run.record, run.record.main_split
    if split not in record.class_predictions:
        return None
    counts, names = record.class_predictions[split].confusion, record.classes
    wrong = counts - np.diag(counts.diagonal())
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:20]
    table: list[list[Cell]] = []
    for true, predicted in zip(*np.unravel_index(pairs, wrong.shape), strict=True):
        count, rows = int(wrong[true, predicted]), int(counts[true].sum())
        if count:
            table.append([names[true], names[predicted], count, Measured(count / rows, wilson(count, rows))])
    alt = f"Confusion matrix of {split}: {int(counts.trace())} of {int(counts.sum())} rows on the diagonal"
    caption = f"{split}, {int(counts.sum()):,} rows; color: fraction of the true class"
    if len(names) > 24:
        caption += " (square root); axes: class numbers of the table of per-class metrics"
    heatmap = Figures([Figure(figures.confusion_heatmap(counts, names, alt), caption, wide=True)])
    pairs_table = Table("Most confused classes", ["true class", "predicted class", "rows", "of the true class"], table)
    return Section("Confusion matrix", [heatmap, pairs_table if table else Note("There are no misclassified rows.")])


def calibration(run: Run) -> Section | None:
    """Returns reliability diagram and scores before and after temperature scaling; None without probabilities."""
    record, split = run.record, run.record.main_split
    if split is None:
        return None
    before = _calibration(record, split, 1.0)
    if not before.rows:
        return None
    calibrations, notes = {"uncalibrated": before}, []
    if split == "test" and "validation" in record.splits:
        temperature, note = _fit_temperature(record)
        notes.append(Note(note))
        if temperature:
            calibrations[f"temperature {temperature:.2f}"] = _calibration(record, split, temperature)
    else:
        notes.append(Note("No temperature was fitted: temperature scaling needs a validation and a test split."))
    scores = {name: calibration.compute() for name, calibration in calibrations.items()}
    table = [[name, *(score[key] for key in ("ece", "nll", "brier"))] for name, score in scores.items()]
    listed = "; ".join(f"{name}: ECE {score['ece']:.3f}" for name, score in scores.items())
    diagram = figures.reliability_diagram(calibrations, f"Reliability diagram of {split}. {listed}")
    caption = f"{split}: accuracy in 15 confidence bins; marker area: number of rows; lines: 95 % Wilson intervals"
    about = (
        "ECE: expected calibration error, the mean absolute difference of confidence and accuracy over the bins "
        "(Guo et al. 2017). It is above 0 even for a perfectly calibrated model, and larger with fewer rows. NLL: mean "
        "negative log-likelihood. Brier: squared difference of probabilities and one-hot target, summed over classes, "
        "0 to 2. Lower is better for all."
    )
    scores_table = Table(f"Calibration on {split}", ["probabilities", "ECE", "NLL", "Brier"], table)
    return Section("Calibration", [Figures([Figure(diagram, caption)]), scores_table, *notes, Note(about)])


def _calibration(record: RunRecord, split: str, temperature: float) -> Calibration:
    calibration = Calibration(temperature)
    for probabilities, labels in record.probabilities(split):
        calibration.update(probabilities, labels)
    return calibration


def _fit_temperature(record: RunRecord) -> tuple[float | None, str]:
    """Returns the temperature fitted on validation (None if not fitted), and a note about the fit."""
    limit = max(_MAX_FIT_VALUES // max(len(record.classes), 1), 1)
    rows = len(record.class_predictions["validation"].labels) if "validation" in record.class_predictions else 0
    stride = -(-rows // limit) or 1
    batches: list[Any] = []
    position = 0
    for probabilities, labels in record.probabilities("validation"):
        first = -position % stride
        batches.append((probabilities[first::stride], labels[first::stride]))
        position += len(labels)
    if not batches:
        return None, "No temperature was fitted: there are no probabilities of validation rows."
    probabilities, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    temperature = fit_temperature(probabilities, labels)
    if temperature is None:
        return None, f"No temperature was fitted: all {len(labels):,} validation rows are correct."
    errors = int((probabilities.argmax(1) != labels).sum())
    confidence = "overconfident" if temperature > 1 else "underconfident"
    return temperature, (
        f"Temperature {temperature:.3f} minimizes the NLL on {len(labels):,} validation rows ({errors} errors): the "
        f"model is {confidence} on them. To apply it, divide the logits by it; predictions do not change."
    )


def largest_errors_section(run: Run) -> Section | None:
    """Returns examples of the most confident errors, or of the largest errors of other tasks."""
    record, split = run.record, run.record.main_split
    if split is None or split not in record.answers:
        return None
    positions, count, order = largest_errors(record, split)
    title = "Most confident errors" if split in record.class_predictions else "Largest errors"
    rows = len(record.answers[split].rows)
    if not count:
        return Section(title, [Note(f"All {rows:,} rows of {split} are correct.")])
    blocks: list[Any] = [Note(f"{len(positions)} of {count:,} errors in {rows:,} rows of {split}, {order} first.")]
    if run.rows.missing:
        blocks.append(Note(run.rows.missing, warning=True))
    return Section(title, [*blocks, Gallery(run.rows.examples(split, positions))])


def _fraction(numerator: Any, denominator: Any) -> Measured:
    """Returns a fraction with its Wilson interval; no value if the denominator is 0."""
    if not denominator:
        return Measured(None)
    return Measured(float(numerator / denominator), wilson(int(numerator), int(denominator)))
