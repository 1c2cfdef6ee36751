"""Ways of training side by side, from compare.json: on the page of a comparison, and on that of the run it kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Section, Table
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.run_view import Run


def conclusion(run: Run) -> Section | None:
    """The comparison that the run comes from, where it comes from one."""
    found = run.record.comparison
    return conclusion_section(found, kept=run.record.name) if found else None


def conclusion_section(found: Mapping[str, Any], kept: str | None = None) -> Section:
    """Did transfer help? The sentence, the methods with their cost, differences and quality over time.

    Args:
        found: What `hftl compare` wrote.
        kept: The run whose page this is, None on the page of the comparison.
    """
    blocks: list[Any] = [Note(found["sentence"]), *(Note(text, warning=True) for text in found["warnings"])]
    blocks.append(_table(found))
    drawn = [figure for figure in (_differences(found), _costs(found)) if figure]
    if drawn:
        blocks.append(Figures(drawn))
    about = (
        f"{found['budget'][0].upper()}{found['budget'][1:]}. In brackets: 95 % intervals of the difference over the "
        f"{found['rows']:,} rows of {found['split']} (paired bootstrap) and over seeds (Student's t). Each interval is "
        "for one comparison alone, and of many some miss by chance; the verdict is about one, the method that "
        "validation chose. Time: training, evaluations included, mean over seeds; what one run computed and later ones "
        "reuse counts where it was computed. Memory: the most that one run held."
    )
    blocks.append(Note(about))
    if kept is not None:
        blocks.append(Note(f"This run ({found['kept']}) is the best of all on validation."))
    return Section("Did transfer help?", blocks)


def _table(found: Mapping[str, Any]) -> Table:
    metric, baseline = f"{found['split']} {found['metric']}", found["baseline"]
    rows: list[list[Cell]] = []
    for result in found["results"]:
        apart, scores, peak = result["difference"], result["scores"], result["peak_bytes"]
        rows.append(
            [
                result["method"],
                len(scores),
                sum(scores) / len(scores) if scores else None,
                Measured(apart["value"], (apart["low"], apart["high"])) if apart else None,
                result["trainable"],
                duration(result["seconds"]) if result["seconds"] is not None else None,
                mebibytes(peak) if peak else None,
            ]
        )
    head = ["method", "seeds", metric, f"against {baseline}", "trained", "time a run", "peak memory"]
    return Table("Ways of training", head, rows)


def _differences(found: Mapping[str, Any]) -> Figure | None:
    drawn = {
        result["method"]: tuple(100 * apart[end] for end in ("value", "low", "high")) if apart else (0.0, 0.0, 0.0)
        for result in found["results"]
        if (apart := result["difference"]) or result["method"] == found["baseline"]
    }
    if len(drawn) < 2:
        return None
    said = ", ".join(f"{name} {value:+.1f} ({low:+.1f} to {high:+.1f})" for name, (value, low, high) in drawn.items())
    axis = f"points of {found['split']} {found['metric']} against {found['baseline']}"
    return Figure(figures.difference_plot(drawn, f"{axis}: {said}", x=axis), "Difference, with its 95 % interval")


def _costs(found: Mapping[str, Any]) -> Figure | None:
    drawn = {
        result["method"]: ([result["seconds"]] * len(result["scores"]), result["scores"])
        for result in found["results"]
        if result["scores"] and result["seconds"]
    }
    if not drawn:
        return None
    said = ", ".join(f"{name} {sum(ys) / len(ys):.3f} in {xs[0]:.3g} s" for name, (xs, ys) in drawn.items())
    metric = f"{found['split']} {found['metric']}"
    svg = figures.marks(drawn, f"{metric} by seconds of training: {said}", x="seconds a run", y=metric)
    return Figure(svg, "Quality and cost, one mark a run, at the mean time of its method")
