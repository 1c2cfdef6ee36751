"""Section of regression: predictions over targets."""

from __future__ import annotations

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Note, Section, Table
from hftl.reporting.run_view import Run
from hftl.tasks.predictions import RegressionPredictions

MAX_POINTS = 2_000
"""Maximum number of points of a figure."""
MAX_FIGURES = 6


def regression(run: Run) -> Section | None:
    """Returns plots of predictions over targets, and statistics of both; None for other tasks."""
    record, split = run.record, run.record.main_split
    predictions = record.answers.get(split or "")
    if not isinstance(predictions, RegressionPredictions):
        return None
    count = len(predictions.rows)
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(int))
    plots, table = [], []
    for k, name in enumerate(predictions.names):
        true, predicted = predictions.labels[:, k], predictions.predictions[:, k]
        if k < MAX_FIGURES:
            alt, x, y = f"{name}: predictions over targets, {len(rows):,} rows of {split}", f"true {name}", "predicted "
            svg = figures.predicted_over_actual(true[rows], predicted[rows], alt, x=x, y=y + name)
            plots.append(Figure(svg, f"{name}, {len(rows):,} of {count:,} rows of {split}; dashed: identity"))
        row: list[Cell] = [name, *(_statistics(values) for values in (true, predicted))]
        table.append([*row, float(np.mean(predicted - true))])
    head = ["output", f"target in {split}: mean ± std, range", "prediction", "mean error"]
    note = Note("Mean error: mean of prediction minus target (bias).")
    return Section("Regression", [Figures(plots), Table("Targets and predictions", head, table), note])


def _statistics(values: np.ndarray) -> str:
    return f"{values.mean():.4g} ± {values.std():.3g}, {values.min():.4g} to {values.max():.4g}"
