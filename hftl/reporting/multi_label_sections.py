"""Section of multi-label classification: per-label metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl.html.blocks import Cell, Note, Section, Table
from hftl.reporting.run_view import MAX_LISTED_CLASSES, Run
from hftl.tasks.predictions import MultiLabelPredictions
from hftl.tasks.targets.multi_label.metrics import label_scores


def per_label_metrics(run: Run) -> Section | None:
    """Returns average precision, threshold, precision, recall and F1 of each label; None for other tasks."""
    record, split = run.record, run.record.main_split
    predictions = record.answers.get(split or "")
    if not isinstance(predictions, MultiLabelPredictions):
        return None
    labels, thresholds = predictions.names, predictions.thresholds
    scores = label_scores(predictions.labels, predictions.probabilities, thresholds)
    is_sorted = len(labels) > 20
    order = np.argsort(scores["f1"], kind="stable")[:MAX_LISTED_CLASSES] if is_sorted else range(len(labels))
    metrics = ("average_precision", "precision", "recall", "f1")
    table: list[list[Cell]] = [
        [
            labels[k],
            int(scores["rows"][k]),
            int(scores["predicted"][k]),
            round(float(thresholds[k]), 4),
            *(float(scores[name][k]) for name in metrics),
        ]
        for k in order
    ]
    caption = f"Labels of {split}" + (", lowest F1 first" if is_sorted else "") + f" ({len(table)} of {len(labels)})"
    head = ["label", "rows", "predicted", "threshold", "average precision", "precision", "recall", "F1"]
    unlabeled = int((~predictions.labels.any(1)).sum())
    tuned = "selected on validation by F1" if set(thresholds) != {0.5} else "0.5 without a validation split"
    about = (
        f"{unlabeled:,} of {len(predictions.rows):,} rows of {split} have no label. A label is predicted if its "
        f"probability reaches the threshold, {tuned}. Average precision does not depend on the threshold."
    )
    blocks: list[Any] = [Table(caption, head, table), Note(about)]
    return Section("Per-label metrics", blocks)
