"""The section about rows with any number of labels each."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl.html.blocks import Cell, Note, Section, Table
from hftl.reporting.run_view import CLASSES_LISTED, Run
from hftl.tasks.predictions import MultiLabelPredictions
from hftl.tasks.targets.multi_label.metrics import label_scores


def labels(run: Run) -> Section | None:
    """Average precision, threshold, precision, recall and F1 of each label."""
    record, split = run.record, run.record.main_split
    found = record.answers.get(split or "")
    if not isinstance(found, MultiLabelPredictions):
        return None
    scores = label_scores(found.labels, found.probabilities, found.thresholds)
    lowest = len(found.names) > 20
    order = np.argsort(scores["f1"], kind="stable")[:CLASSES_LISTED] if lowest else range(len(found.names))
    names = ("average_precision", "precision", "recall", "f1")
    table: list[list[Cell]] = [
        [
            found.names[k],
            int(scores["rows"][k]),
            int(scores["predicted"][k]),
            round(float(found.thresholds[k]), 4),
            *(float(scores[name][k]) for name in names),
        ]
        for k in order
    ]
    caption = f"Labels of {split}" + (", lowest F1 first" if lowest else "") + f" ({len(table)} of {len(found.names)})"
    head = ["label", "rows", "predicted", "threshold", "average precision", "precision", "recall", "F1"]
    blocks: list[Any] = [Table(caption, head, table), Note(_about(found, split or ""))]
    return Section("Labels", blocks)


def _about(found: MultiLabelPredictions, split: str) -> str:
    none = int((~found.labels.any(1)).sum())
    chosen = set(found.thresholds) != {0.5}
    return (
        f"{none:,} of {len(found.rows):,} rows of {split} have no label. A row is said to have a label where its "
        "probability is at least the threshold, "
        + (
            "which has the largest F1 of the label on validation."
            if chosen
            else "0.5: no validation split chose others."
        )
        + " Average precision does not depend on it."
    )
