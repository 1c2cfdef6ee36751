"""The section about rows with numbers."""

from __future__ import annotations

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Note, Section, Table
from hftl.reporting.run_view import Run
from hftl.tasks.predictions import RegressionPredictions

DRAWN = 2_000
"""Points of a figure."""
OUTPUTS_DRAWN = 6


def numbers(run: Run) -> Section | None:
    """Predictions over truth, and where the truth lies against what is answered."""
    record, split = run.record, run.record.main_split
    found = record.answers.get(split or "")
    if not isinstance(found, RegressionPredictions):
        return None
    rows = np.unique(np.linspace(0, len(found.rows) - 1, min(len(found.rows), DRAWN)).astype(int))
    drawn, table = [], []
    for k, name in enumerate(found.names):
        true, said = found.labels[:, k], found.predictions[:, k]
        if k < OUTPUTS_DRAWN:
            alt = f"{name}: predictions over truth for {len(rows):,} rows of {split}"
            svg = figures.against_truth(true[rows], said[rows], alt, x=f"true {name}", y=f"predicted {name}")
            drawn.append(Figure(svg, f"{name}, {len(rows):,} of {len(found.rows):,} rows of {split}; dashed: equal"))
        row: list[Cell] = [name, *(_range(values) for values in (true, said)), float(np.mean(said - true))]
        table.append(row)
    head = ["output", f"true in {split}: mean ± spread, range", "predicted", "mean error"]
    note = Note("Mean error: prediction minus truth; away from 0 the model answers too much or too little on average.")
    return Section("Numbers", [Figures(drawn), Table("Truth and predictions", head, table), note])


def _range(values: np.ndarray) -> str:
    return f"{values.mean():.4g} ± {values.std():.3g}, {values.min():.4g} to {values.max():.4g}"
