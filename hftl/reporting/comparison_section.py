"""Section about the comparison of training methods (compare.json), for comparison pages and run reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Section, Table
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.run_view import Run


def transfer_gain(run: Run) -> Section | None:
    """Returns the comparison that selected this run; None if the run is not part of one."""
    comparison = run.record.comparison
    return transfer_gain_section(comparison, is_run_report=True) if comparison else None


def transfer_gain_section(comparison: Mapping[str, Any], is_run_report: bool = False) -> Section:
    """Returns the conclusion of a comparison, and metrics, cost and differences of its training methods.

    Args:
        comparison: Content of compare.json.
        is_run_report: Whether the page is the report of the selected run.
    """
    blocks: list[Any] = [Note(comparison["sentence"]), *(Note(text, warning=True) for text in comparison["warnings"])]
    blocks.append(_methods_table(comparison))
    plots = [figure for figure in (_difference_figure(comparison), _cost_figure(comparison)) if figure]
    if plots:
        blocks.append(Figures(plots))
    about = (
        f"{comparison['budget'][0].upper()}{comparison['budget'][1:]}. In brackets: 95 % intervals of the difference "
        f"over the {comparison['rows']:,} rows of {comparison['split']} (paired bootstrap) and over seeds (Student's "
        "t), not corrected for multiple comparisons. The conclusion refers to one comparison: the method selected on "
        "validation. Time: training including evaluations, mean over seeds; results reused by later runs count for the "
        "run that computed them. Memory: maximum over runs."
    )
    blocks.append(Note(about))
    if is_run_report:
        blocks.append(Note(f"This run ({comparison['kept']}) has the best validation metric of all runs."))
    return Section("Transfer gain", blocks)


def _methods_table(comparison: Mapping[str, Any]) -> Table:
    metric, baseline = f"{comparison['split']} {comparison['metric']}", comparison["baseline"]
    rows: list[list[Cell]] = []
    for result in comparison["results"]:
        difference, scores, peak = result["difference"], result["scores"], result["peak_bytes"]
        rows.append(
            [
                result["method"],
                len(scores),
                sum(scores) / len(scores) if scores else None,
                Measured(difference["value"], (difference["low"], difference["high"])) if difference else None,
                result["trainable"],
                duration(result["seconds"]) if result["seconds"] is not None else None,
                mebibytes(peak) if peak else None,
            ]
        )
    head = ["method", "seeds", metric, f"vs {baseline}", "trainable parameters", "time per run", "peak memory"]
    return Table("Training methods", head, rows)


def _difference_figure(comparison: Mapping[str, Any]) -> Figure | None:
    differences = {
        result["method"]: tuple(100 * interval[end] for end in ("value", "low", "high"))
        if interval
        else (0.0, 0.0, 0.0)
        for result in comparison["results"]
        if (interval := result["difference"]) or result["method"] == comparison["baseline"]
    }
    if len(differences) < 2:
        return None
    listed = ", ".join(
        f"{name} {value:+.1f} ({low:+.1f} to {high:+.1f})" for name, (value, low, high) in differences.items()
    )
    axis = f"points of {comparison['split']} {comparison['metric']} vs {comparison['baseline']}"
    return Figure(figures.difference_plot(differences, f"{axis}: {listed}", x=axis), "Difference with 95 % interval")


def _cost_figure(comparison: Mapping[str, Any]) -> Figure | None:
    points = {
        result["method"]: ([result["seconds"]] * len(result["scores"]), result["scores"])
        for result in comparison["results"]
        if result["scores"] and result["seconds"]
    }
    if not points:
        return None
    listed = ", ".join(f"{name} {sum(ys) / len(ys):.3f} in {xs[0]:.3g} s" for name, (xs, ys) in points.items())
    metric = f"{comparison['split']} {comparison['metric']}"
    svg = figures.scatter_plot(points, f"{metric} by training time: {listed}", x="seconds per run", y=metric)
    return Figure(svg, "Metric over training time, one marker per run, at the mean time of its method")
