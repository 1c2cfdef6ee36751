"""Plots as SVG elements, with one pair of axes each; by default as wide as a phone screen.

Text and axes use `currentColor`, so plots follow the light or dark theme of the page. Text is not converted to paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_INK = "#010203"
"""Placeholder color, replaced by `currentColor` in the SVG; not used for data."""
_COLORS = ("#2f86d1", "#e08a1e", "#1a9e77", "#d1495b", "#9d6bce", "#7a8794", "#b0893b", "#4bb5c1")
_LINE_STYLES = ("-", "--", ":", "-.")
_RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hftl",  # reproducible ids: equal runs produce equal pages
    "text.parse_math": False,  # class names may contain $
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""x and y values of lines, by name."""


def line_plot(curves: Curves, alt: str, *, x: str, y: str, vline: float | None = None, log: bool = False) -> str:
    """Returns a line plot.

    Args:
        curves: Lines by name.
        alt: Alternative text.
        x: Label of the x axis.
        y: Label of the y axis.
        vline: x position of a vertical dotted line.
        log: Whether the y axis is logarithmic.
    """

    def draw(axes: Any) -> None:
        for number, (name, (xs, ys)) in enumerate(curves.items()):
            markers = {"marker": "o", "markersize": 4} if len(xs) <= 30 else {}
            style, color = _LINE_STYLES[number // len(_COLORS) % len(_LINE_STYLES)], _COLORS[number % len(_COLORS)]
            axes.plot(xs, ys, style, color=color, label=_legend_label(name), linewidth=1.8, **markers)
        if vline is not None:
            axes.axvline(vline, color=_INK, linewidth=1, linestyle=":", alpha=0.7)
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
            axes.minorticks_off()
        if len(curves) > 1:
            _legend_below(axes, list(curves))

    return _svg(draw, alt, height=3.5 + 0.2 * (len(curves) if len(curves) > 4 else 0))


def confusion_heatmap(counts: Any, names: Sequence[str], alt: str) -> str:
    """Returns a heatmap of a confusion matrix [K, K], normalized over true classes; annotated up to 16 classes."""
    size = len(counts)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(axes: Any) -> None:
        axes.grid(False)
        # errors of many classes are rare per cell: the square root keeps them visible
        axes.imshow(fractions**0.5 if size > 24 else fractions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        if size > 24:
            return
        ticks = [truncate(name) for name in names]
        axes.set_xticks(range(size), ticks, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), ticks)
        if size <= 16:
            for (true, predicted), count in np.ndenumerate(counts):
                if count:
                    color = "white" if fractions[true, predicted] > 0.55 else "#0b2545"
                    axes.text(predicted, true, str(count), ha="center", va="center", color=color, fontsize=9)

    inches = 5.2 if size <= 6 else 6.6 if size <= 12 else 8.4
    return _svg(draw, alt, width=inches, height=inches * 0.88)


def reliability_diagram(calibrations: Mapping[str, Any], alt: str) -> str:
    """Returns a reliability diagram: accuracy over confidence per bin, with 95 % Wilson intervals.

    The area of a marker grows with the number of rows in its bin.

    Args:
        calibrations: `Calibration` objects by name.
        alt: Alternative text.
    """
    from hftl.statistics.confidence_intervals import wilson

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":", alpha=0.7, label="perfect")
        for number, (name, bins) in enumerate(calibrations.items()):
            filled = np.nonzero(bins.counts)[0]
            confidence = bins.confidence[filled] / bins.counts[filled]
            accuracy = bins.right[filled] / bins.counts[filled]
            ends = np.array([wilson(bins.right[b], bins.counts[b]) for b in filled])
            axes.errorbar(
                confidence,
                accuracy,
                np.maximum([accuracy - ends[:, 0], ends[:, 1] - accuracy], 0),
                fmt="none",
                ecolor=_COLORS[number],
                elinewidth=1,
                alpha=0.8,
            )
            area = 12 + 180 * bins.counts[filled] / bins.rows
            style: Any = {"color": _COLORS[number], "marker": "os"[number % 2], "alpha": 0.75, "linewidths": 0}
            axes.scatter(confidence, accuracy, area, label=_legend_label(name), **style)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        _legend_below(axes, ["perfect", *calibrations])

    return _svg(draw, alt, height=4.4)


def cost_and_score(points: Mapping[str, tuple[float, float, tuple[float, float]]], alt: str, *, x: str, y: str) -> str:
    """Returns scores with intervals over a logarithmic cost axis.

    Args:
        points: (cost, score, (low, high)) by name.
        alt: Alternative text.
        x: Label of the cost axis.
        y: Label of the score axis.
    """

    def draw(axes: Any) -> None:
        for number, (name, (cost, score, (low, high))) in enumerate(points.items()):
            color, shape = _COLORS[number % len(_COLORS)], "osD^vP*X"[number // len(_COLORS) % 8]
            axes.plot([cost, cost], [low, high], color=color, linewidth=1.2)
            axes.plot([cost], [score], shape, color=color, markersize=7, label=_legend_label(name), linestyle="none")
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        _legend_below(axes, list(points))

    return _svg(draw, alt, height=3.4 + 0.2 * len(points))


def histogram(values: Mapping[str, Any], alt: str, *, x: str, bins: int = 30) -> str:
    """Returns a histogram; several series share their bins.

    Args:
        values: Values of each series, by name.
        alt: Alternative text.
        x: Label of the x axis.
        bins: Number of bins.
    """
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, dtype=float) for v in values.values()]), bins)

    def draw(axes: Any) -> None:
        for number, (name, series) in enumerate(values.items()):
            options = {"histtype": "stepfilled", "alpha": 0.55, "edgecolor": _COLORS[number]}
            axes.hist(series, edges, color=_COLORS[number], label=_legend_label(name), **options)
        axes.set(xlabel=x, ylabel="rows")
        if len(values) > 1:
            _legend_below(axes, list(values))

    return _svg(draw, alt, height=3.5)


def class_distribution(counts: Mapping[str, Any], names: Sequence[str], alt: str) -> str:
    """Returns the class distribution of each split in percent.

    More than 24 classes are sorted by frequency and drawn as lines without names.

    Args:
        counts: Rows per class [K], by split.
        names: Class names [K].
        alt: Alternative text.
    """
    size, width = len(names), 0.8 / len(counts)
    order = np.argsort(-np.asarray(next(iter(counts.values()))), kind="stable") if size > 24 else np.arange(size)

    def draw(axes: Any) -> None:
        for number, (split, rows) in enumerate(counts.items()):
            percent = np.asarray(rows)[order] / max(np.sum(rows), 1) * 100
            positions = np.arange(size) + (number - (len(counts) - 1) / 2) * width
            if size > 24:
                axes.plot(range(size), percent, color=_COLORS[number], label=split, linewidth=1.6)
            else:
                axes.barh(positions, percent, width, color=_COLORS[number], label=split)
        if size > 24:
            axes.set(xlabel=f"{size} classes, by rows in {next(iter(counts))}", ylabel="% of the split", ylim=(0, None))
        else:
            axes.set_yticks(range(size), [truncate(name) for name in names])
            axes.invert_yaxis()
            axes.set(xlabel="% of the split")
        _legend_below(axes, list(counts))

    return _svg(draw, alt, height=3.5 if size > 24 else 1.7 + 0.34 * size)


def difference_plot(differences: Mapping[str, tuple[float, float, float]], alt: str, *, x: str) -> str:
    """Returns differences with intervals, one row per name, and a vertical line at zero.

    Args:
        differences: (value, low, high) by name.
        alt: Alternative text.
        x: Label of the x axis.
    """
    names = list(differences)

    def draw(axes: Any) -> None:
        axes.axvline(0, color=_INK, linewidth=1, linestyle=":", alpha=0.8)
        for number, (value, low, high) in enumerate(differences.values()):
            color = _COLORS[number % len(_COLORS)]
            axes.plot([low, high], [number, number], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([low, high], [number, number], "|", color=color, markersize=10, markeredgewidth=2)
            axes.plot([value], [number], "o", color=color, markersize=7)
        axes.set_yticks(range(len(names)), [truncate(name) for name in names])
        axes.set(xlabel=x, ylim=(len(names) - 0.5, -0.5))

    return _svg(draw, alt, height=1.3 + 0.45 * len(names))


def scatter_plot(points: Curves, alt: str, *, x: str, y: str) -> str:
    """Returns a scatter plot with logarithmic x axis, with one color and marker per name."""

    def draw(axes: Any) -> None:
        for number, (name, (xs, ys)) in enumerate(points.items()):
            color, shape = _COLORS[number % len(_COLORS)], "osD^vP*X"[number % 8]
            axes.scatter(xs, ys, 46, color=color, marker=shape, label=_legend_label(name), alpha=0.8, linewidths=0)
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        _legend_below(axes, list(points))

    return _svg(draw, alt, height=3.6)


def predicted_over_actual(labels: Any, predictions: Any, alt: str, *, x: str, y: str) -> str:
    """Returns a scatter plot of predictions [N] over targets [N], with the identity line."""

    def draw(axes: Any) -> None:
        ends = [float(min(labels.min(), predictions.min())), float(max(labels.max(), predictions.max()))]
        axes.plot(ends, ends, "--", color=_INK, linewidth=1, alpha=0.6)
        axes.scatter(labels, predictions, 14, color=_COLORS[0], alpha=0.45, linewidths=0)
        axes.set(xlabel=x, ylabel=y)

    return _svg(draw, alt, height=3.6)


def truncate(name: str, limit: int = 18) -> str:
    """Returns a name truncated to `limit` characters, for tick labels."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _legend_label(name: str) -> str:
    """Returns a legend label; a zero-width space precedes underscores, which matplotlib would hide."""
    return truncate("\u200b" + name if name.startswith("_") else name, 44)


def _legend_below(axes: Any, names: Sequence[str]) -> None:
    characters = 60  # per legend line; a line sample is 6 characters wide
    widths = [len(_legend_label(name)) + 6 for name in names]
    columns = len(names) if sum(widths) <= characters else max(characters // max(widths), 1)
    axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=2.2, borderaxespad=0.2)


def _svg(draw: Callable[[Any], None], alt: str, *, width: float = 5.2, height: float) -> str:
    """Returns an SVG element with the axes filled by `draw`.

    Args:
        draw: Function that plots on matplotlib axes.
        alt: Alternative text.
        width: Width in inches.
        height: Height in inches.
    """
    import io
    import re
    import warnings

    import matplotlib
    from markupsafe import escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_RC_PARAMS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # missing glyphs: the browser uses its own fonts
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained")  # dpi of embedded heatmaps
        draw(figure.add_subplot())
        for patch in (figure.patch, figure.axes[0].patch):
            patch.set_visible(False)
        # like savefig, without its additional draw that measures the figure
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(out, metadata=no_metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(f": {_INK}", ": currentColor")
    text = re.sub('<g id="[^"]*"', "<g", text)  # ids must be unique per page, and no element references groups
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
