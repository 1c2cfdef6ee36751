"""Drawings as SVG: one pair of axes each, as wide as a phone, so that a page can stack or align them.

Text and axes are drawn in `currentColor`, so a figure follows the page from light to dark. Text stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_INK = "#010203"
"""Stands for the colour of the page's text until the SVG is written; used by nothing else."""
_COLOURS = ("#2f86d1", "#e08a1e", "#1a9e77", "#d1495b", "#9d6bce", "#7a8794", "#b0893b", "#4bb5c1")
_STYLES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hftl",  # equal runs give equal pages
    "text.parse_math": False,  # a class may be called $x$
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
"""Name -> x and y of a line."""


def lines(curves: Curves, alt: str, *, x: str, y: str, mark: float | None = None, log: bool = False) -> str:
    """Returns lines over a common axis; `mark` is an x at which a vertical line stands."""

    def draw(axes: Any) -> None:
        for number, (name, (xs, ys)) in enumerate(curves.items()):
            few = {"marker": "o", "markersize": 4} if len(xs) <= 30 else {}
            style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
            axes.plot(xs, ys, style, color=_COLOURS[number % len(_COLOURS)], label=_entry(name), linewidth=1.8, **few)
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=1, linestyle=":", alpha=0.7)
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
            axes.minorticks_off()
        if len(curves) > 1:
            _legend_below(axes, list(curves))

    return _svg(draw, alt, height=3.5 + 0.2 * (len(curves) if len(curves) > 4 else 0))


def confusion_heatmap(counts: Any, names: Sequence[str], alt: str) -> str:
    """Returns a confusion matrix [K, K] coloured by share of the true class; with few classes the counts are in it."""
    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(axes: Any) -> None:
        axes.grid(False)
        # with many classes errors are thin: the square root of a share is still seen
        axes.imshow(shares**0.5 if size > 24 else shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        if size > 24:
            return
        axes.set_xticks(range(size), [cut(name) for name in names], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), [cut(name) for name in names])
        if size <= 16:
            for (true, predicted), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if shares[true, predicted] > 0.55 else "#0b2545"
                    axes.text(predicted, true, str(count), ha="center", va="center", color=colour, fontsize=9)

    inches = 5.2 if size <= 6 else 6.6 if size <= 12 else 8.4
    return _svg(draw, alt, width=inches, height=inches * 0.88)


def reliability(found: Mapping[str, Any], alt: str) -> str:
    """Returns accuracy over confidence by bin, marks as large as their rows, with 95 % Wilson intervals.

    Args:
        found: `Calibration`s by name.
        alt: What is read to who cannot see it.
    """
    from hftl.statistics.confidence_intervals import wilson

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":", alpha=0.7, label="perfect")
        for number, (name, bins) in enumerate(found.items()):
            seen = np.nonzero(bins.counts)[0]
            confidence = bins.confidence[seen] / bins.counts[seen]
            accuracy = bins.right[seen] / bins.counts[seen]
            ends = np.array([wilson(bins.right[b], bins.counts[b]) for b in seen])
            axes.errorbar(
                confidence,
                accuracy,
                np.maximum([accuracy - ends[:, 0], ends[:, 1] - accuracy], 0),
                fmt="none",
                ecolor=_COLOURS[number],
                elinewidth=1,
                alpha=0.8,
            )
            area = 12 + 180 * bins.counts[seen] / bins.rows
            colour, shape = _COLOURS[number], "os"[number % 2]
            axes.scatter(
                confidence, accuracy, area, color=colour, marker=shape, label=_entry(name), alpha=0.75, linewidths=0
            )
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        _legend_below(axes, ["perfect", *found])

    return _svg(draw, alt, height=4.4)


def cost_and_score(found: Mapping[str, tuple[float, float, tuple[float, float]]], alt: str, *, x: str, y: str) -> str:
    """Returns a mark with its interval for each name (cost, score, (low, high)), over a logarithmic cost."""

    def draw(axes: Any) -> None:
        for number, (name, (cost, score, (low, high))) in enumerate(found.items()):
            colour, shape = _COLOURS[number % len(_COLOURS)], "osD^vP*X"[number // len(_COLOURS) % 8]
            axes.plot([cost, cost], [low, high], color=colour, linewidth=1.2)
            axes.plot([cost], [score], shape, color=colour, markersize=7, label=_entry(name), linestyle="none")
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        _legend_below(axes, list(found))

    return _svg(draw, alt, height=3.4 + 0.2 * len(found))


def histogram(values: Mapping[str, Any], alt: str, *, x: str, bins: int = 30) -> str:
    """Returns how often values occur; several kinds share their bins."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, dtype=float) for v in values.values()]), bins)

    def draw(axes: Any) -> None:
        for number, (name, found) in enumerate(values.items()):
            options = {"histtype": "stepfilled", "alpha": 0.55, "edgecolor": _COLOURS[number]}
            axes.hist(found, edges, color=_COLOURS[number], label=_entry(name), **options)
        axes.set(xlabel=x, ylabel="rows")
        if len(values) > 1:
            _legend_below(axes, list(values))

    return _svg(draw, alt, height=3.5)


def shares(counts: Mapping[str, Any], names: Sequence[str], alt: str) -> str:
    """Returns the share of each class [K] in each split; with many classes sorted and without names."""
    size, width = len(names), 0.8 / len(counts)
    order = np.argsort(-np.asarray(next(iter(counts.values()))), kind="stable") if size > 24 else np.arange(size)

    def draw(axes: Any) -> None:
        for number, (split, found) in enumerate(counts.items()):
            part = np.asarray(found)[order] / max(np.sum(found), 1) * 100
            place = np.arange(size) + (number - (len(counts) - 1) / 2) * width
            if size > 24:
                axes.plot(range(size), part, color=_COLOURS[number], label=split, linewidth=1.6)
            else:
                axes.barh(place, part, width, color=_COLOURS[number], label=split)
        if size > 24:
            axes.set(xlabel=f"{size} classes, by rows in {next(iter(counts))}", ylabel="% of the split", ylim=(0, None))
        else:
            axes.set_yticks(range(size), [cut(name) for name in names])
            axes.invert_yaxis()
            axes.set(xlabel="% of the split")
        _legend_below(axes, list(counts))

    return _svg(draw, alt, height=3.5 if size > 24 else 1.7 + 0.34 * size)


def difference_plot(found: Mapping[str, tuple[float, float, float]], alt: str, *, x: str) -> str:
    """Returns one line for each name: a value with the interval around it (value, low, high), and where zero is."""
    names = list(found)

    def draw(axes: Any) -> None:
        axes.axvline(0, color=_INK, linewidth=1, linestyle=":", alpha=0.8)
        for number, (value, low, high) in enumerate(found.values()):
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([low, high], [number, number], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([low, high], [number, number], "|", color=colour, markersize=10, markeredgewidth=2)
            axes.plot([value], [number], "o", color=colour, markersize=7)
        axes.set_yticks(range(len(names)), [cut(name) for name in names])
        axes.set(xlabel=x, ylim=(len(names) - 0.5, -0.5))

    return _svg(draw, alt, height=1.3 + 0.45 * len(names))


def marks(found: Curves, alt: str, *, x: str, y: str) -> str:
    """Returns the points of each name over a logarithmic x, in one colour and shape a name."""

    def draw(axes: Any) -> None:
        for number, (name, (xs, ys)) in enumerate(found.items()):
            colour, shape = _COLOURS[number % len(_COLOURS)], "osD^vP*X"[number % 8]
            axes.scatter(xs, ys, 46, color=colour, marker=shape, label=_entry(name), alpha=0.8, linewidths=0)
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        _legend_below(axes, list(found))

    return _svg(draw, alt, height=3.6)


def against_truth(labels: Any, predictions: Any, alt: str, *, x: str, y: str) -> str:
    """Returns predictions [N] over labels [N] as points, with the line on which both are equal."""

    def draw(axes: Any) -> None:
        ends = [float(min(labels.min(), predictions.min())), float(max(labels.max(), predictions.max()))]
        axes.plot(ends, ends, "--", color=_INK, linewidth=1, alpha=0.6)
        axes.scatter(labels, predictions, 14, color=_COLOURS[0], alpha=0.45, linewidths=0)
        axes.set(xlabel=x, ylabel=y)

    return _svg(draw, alt, height=3.6)


def cut(name: str, limit: int = 18) -> str:
    """Returns a name short enough for a tick."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _entry(name: str) -> str:
    """Returns a name for a legend, which leaves out what begins with an underscore."""
    return cut("\u200b" + name if name.startswith("_") else name, 44)


def _legend_below(axes: Any, names: Sequence[str]) -> None:
    letters = 60  # of this size beside each other; a line's sample takes the width of six
    widths = [len(_entry(name)) + 6 for name in names]
    columns = len(names) if sum(widths) <= letters else max(letters // max(widths), 1)
    axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=2.2, borderaxespad=0.2)


def _svg(draw: Callable[[Any], None], alt: str, *, width: float = 5.2, height: float) -> str:
    """Returns what `draw` puts on a pair of axes, as an SVG element to stand in HTML."""
    import io
    import re
    import warnings

    import matplotlib
    from markupsafe import escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that its font lacks: the browser has others
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained")  # dpi: of the matrix inside
        draw(figure.add_subplot())
        for patch in (figure.patch, figure.axes[0].patch):
            patch.set_visible(False)
        # as savefig does, without its second drawing that only measures
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(f": {_INK}", ": currentColor")
    text = re.sub('<g id="[^"]*"', "<g", text)  # nothing refers to groups, and a page has each name once
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
