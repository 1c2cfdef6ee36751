"""Sections of the report of one run, in order; a section function returns None if it does not apply to the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Code, Figure, Figures, Note, Quantity, Section, Table, Tiles
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.classification_sections import (
    calibration,
    confusion_section,
    largest_errors_section,
    per_class_metrics,
)
from hftl.reporting.comparison_section import transfer_gain
from hftl.reporting.multi_label_sections import per_label_metrics
from hftl.reporting.regression_sections import regression
from hftl.reporting.run_view import MAX_LISTED_CLASSES, Run
from hftl.reporting.segmentation_sections import segmentation_examples


def summary(run: Run) -> Section:
    """Returns key figures, and all metrics of all splits."""
    record = run.record
    names = list(dict.fromkeys(name.partition("/")[2] for name in record.metrics if "/" in name))
    best = record.facts.get("training", {}).get("best") or {}
    primary = [name for name in (best.get("metric", "").partition("/")[2], *record.primary_metrics) if name in names]
    tiles: list[tuple[str, Cell, str]] = [
        (f"{record.main_split} {name}", run.measured(f"{record.main_split}/{name}"), "")
        for name in list(dict.fromkeys(primary or names))[:2]
    ]
    parameters, training = record.facts.get("adapt", {}), record.facts.get("training", {})
    if parameters.get("total"):
        percent = 100 * parameters["trainable"] / parameters["total"]
        tiles.append(("trainable parameters", parameters["trainable"], f"{percent:.3g} % of {parameters['total']:,}"))
    if "seconds" in training:
        selection = training.get("selection")
        length = f"{len(selection['tried'])} settings tried" if selection else f"{training['steps']:,} steps"
        tiles.append(("training time", duration(training["seconds"]), length))
    blocks: list[Any] = [Tiles(tiles)]
    for split, intervals in run.intervals.items():
        if not intervals and f"{split}/accuracy" in record.metrics:
            text = f"predictions.parquet does not reproduce the {split} metrics of metrics.json: one of the files "
            blocks.append(Note(text + "belongs to another run. There are no intervals.", warning=True))
    micro = [name for name in names if name.startswith("micro_")] if record.classes else []
    listed = [name for name in names if name not in micro]
    table = [[name, *(run.measured(f"{split}/{name}") for split in record.splits)] for name in listed]
    blocks.append(Table("Metrics", ["metric", *record.splits], table))
    blocks.append(Note(_about_metrics(run, bool(micro), best)))
    return Section("Summary", blocks)


def _about_metrics(run: Run, has_micro_averages: bool, best: dict[str, Any]) -> str:
    text = ""
    if best:
        text += f"Best checkpoint: step {best['step']:,}, selected on {best['metric']} ({best['value']:.4f}). "
        if "test" in run.record.splits:
            text += "Validation metrics are optimistic; the test split was not used. "
    if any(run.intervals.values()):
        text += (
            "In brackets: 95 % intervals over the rows of the split (Wilson for fractions of rows, bootstrap with "
            "1,000 resamples for the others); they do not include the variance over seeds. "
        )
    return text + ("Micro averages equal the accuracy in single-label classification." if has_micro_averages else "")


def learning_curves(run: Run) -> Section | None:
    """Returns losses, validation metrics and learning rates over steps; None without history."""
    record = run.record
    best = record.facts.get("training", {}).get("best") or {}
    names = sorted({name for line in record.history for name in line})
    primary = [f"validation/{name}" for name in record.primary_metrics]
    metric = best.get("metric", primary[0] if primary else "validation/loss")
    scores = [name for name in dict.fromkeys((metric, *primary)) if not name.endswith("/loss")]
    panels = [
        ("loss", ["train/loss", "validation/loss"], "loss", False),
        ("validation metrics", scores, "score", False),
        ("learning rate", [name for name in names if name.startswith("lr/")], "learning rate", True),
    ]
    plots = []
    for title, quantities, axis, log in panels:
        curves = {name: record.curve(name) for name in quantities if record.curve(name)[0]}
        if not curves:
            continue
        ends = ", ".join(f"{name} from {ys[0]:.3g} to {ys[-1]:.3g}" for name, (_, ys) in curves.items())
        step = best.get("step") if title != "learning rate" else None
        log = log and all(value > 0 for _, ys in curves.values() for value in ys)
        svg = figures.line_plot(curves, f"{title} by step: {ends}", x="step", y=axis, vline=step, log=log)
        plots.append(Figure(svg, title.capitalize() + (", dotted: best checkpoint" if step else "")))
    return Section("Learning curves", [Figures(plots)]) if plots else None


def data(run: Run) -> Section | None:
    """Returns rows and classes of each split, and the distribution of image sizes or text lengths."""
    record, rows = run.record, run.rows
    recorded = record.facts.get("rows", {})
    blocks: list[Any] = [Table("Rows", ["split", "rows"], [[split, count] for split, count in recorded.items()])]
    plots, class_counts = [], rows.class_counts()
    if class_counts:
        names = record.labels
        alt = "Class distribution in " + ", ".join(class_counts)
        plots.append(Figure(figures.class_distribution(class_counts, names, alt), "Classes, % of each split"))
        first = next(iter(class_counts.values()))
        order = np.argsort(-first, kind="stable")[:MAX_LISTED_CLASSES] if len(names) > 20 else range(len(names))
        table = [[names[k], *(int(counts[k]) for counts in class_counts.values())] for k in order]
        listed = f" ({len(table)} of {len(names)})" if len(table) < len(names) else ""
        blocks.append(Table(f"Rows per class{listed}", ["class", *class_counts], table))
    split = next(iter(rows.splits), None)
    if split and (rows.image_column or rows.text_columns):
        unit, sizes, measured = rows.sizes(split)
        if measured:
            medians = ", ".join(f"{name}: median {np.median(values):g} {unit}" for name, values in sizes.items())
            svg = figures.histogram(sizes, f"Histogram of {unit}. {medians}", x=unit)
            caption = f"{medians} ({measured:,} of {len(rows.splits[split]):,} rows of {split})"
            plots.append(Figure(svg, caption))
    if plots:
        blocks.insert(0, Figures(plots))
    if rows.missing:
        blocks.insert(0, Note(rows.missing, warning=True))
    return Section("Data", blocks)


def training(run: Run) -> Section:
    """Returns parameter counts, time, memory and the verification of the saved model."""
    facts = run.record.facts
    counts, training = facts.get("adapt", {}), facts.get("training", {})
    parts = ("backbone", "backbone_trainable", "adapters", "head", "trainable", "total")
    parameters: list[list[Cell]] = [[part.replace("_", ", "), counts[part]] for part in parts if part in counts]
    cost: list[list[Cell]] = [["steps", training.get("steps")]]
    if "seconds" in training:
        cost.append(["training including evaluations", duration(training["seconds"])])
    for kind in ("resident", "device"):
        if training.get(f"peak_{kind}_bytes"):
            cost.append([f"peak memory, {kind}, main process", mebibytes(training[f"peak_{kind}_bytes"])])
    blocks: list[Any] = [
        Table(f"Parameters (method {counts.get('method', 'unknown')})", ["part", "parameters"], parameters),
        Table("Time and memory", ["quantity", "value"], cost),
    ]
    if training.get("selection"):
        blocks.append(_selection_table(training["selection"]))
    verified = facts.get("verified", {})
    if verified:
        table = [[name, Quantity(f"{value:.2g}")] for name, value in verified.items()]
        head = ["loaded with", "largest logit difference"]
        blocks.append(Table("Saved-model verification", head, table))
    return Section("Training", blocks)


def _selection_table(selection: dict[str, Any]) -> Table:
    """Returns the settings tried by cross-validation, best first."""
    names = list(selection["tried"][0])
    ranked = sorted(selection["tried"], key=lambda tried: (-tried["accuracy"], tried["loss"]))
    caption = (
        f"{selection['head']}: {selection['folds']}-fold cross-validation on {selection['rows']:,} training rows, "
        "best first"
    )
    table = [[f"{tried[name]:g}" if i == 0 else tried[name] for i, name in enumerate(names)] for tried in ranked]
    return Table(caption, names, table)


def configuration(run: Run) -> Section:
    """Returns configuration, environment and package versions."""
    environment = dict(run.record.environment)
    packages = environment.pop("packages", {})
    blocks = [
        Table("Environment", ["name", "value"], [[name, str(value)] for name, value in environment.items()]),
        Table("Packages", ["package", "version"], [[name, str(value)] for name, value in packages.items()]),
        Code("Configuration", (run.record.folder / "config.yaml").read_text(encoding="utf-8")),
    ]
    return Section("Configuration and environment", blocks)


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    summary,
    transfer_gain,
    learning_curves,
    per_class_metrics,
    confusion_section,
    calibration,
    per_label_metrics,
    regression,
    largest_errors_section,
    segmentation_examples,
    data,
    training,
    configuration,
)
