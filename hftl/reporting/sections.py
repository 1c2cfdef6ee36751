"""The sections of one run's page, in order. Each is None where the run has nothing for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Code, Figure, Figures, Note, Quantity, Section, Table, Tiles
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.classification_sections import calibration, classes, confusion_section, errors
from hftl.reporting.comparison_section import conclusion
from hftl.reporting.multi_label_sections import labels
from hftl.reporting.regression_sections import numbers
from hftl.reporting.run_view import CLASSES_LISTED, Run
from hftl.reporting.segmentation_sections import masks


def summary(run: Run) -> Section:
    """The numbers to see first, then all metrics of all splits."""
    record = run.record
    names = list(dict.fromkeys(name.partition("/")[2] for name in record.metrics if "/" in name))
    best = record.facts.get("training", {}).get("best") or {}
    first = [name for name in (best.get("metric", "").partition("/")[2], *record.primary_metrics) if name in names]
    tiles: list[tuple[str, Cell, str]] = [
        (f"{record.main_split} {name}", run.measured(f"{record.main_split}/{name}"), "")
        for name in list(dict.fromkeys(first or names))[:2]
    ]
    adapted, training = record.facts.get("adapt", {}), record.facts.get("training", {})
    if adapted.get("total"):
        share = 100 * adapted["trainable"] / adapted["total"]
        tiles.append(("parameters trained", adapted["trainable"], f"{share:.3g} % of {adapted['total']:,}"))
    if "seconds" in training:
        chosen = training.get("selection")
        length = f"{len(chosen['tried'])} settings tried" if chosen else f"{training['steps']:,} steps"
        tiles.append(("training time", duration(training["seconds"]), length))
    blocks: list[Any] = [Tiles(tiles)]
    for split, found in run.intervals.items():
        if not found and f"{split}/accuracy" in record.metrics:
            text = f"predictions.parquet does not give the metrics of {split} in metrics.json: one of them is not of "
            blocks.append(Note(text + "this run. There are no intervals for it.", warning=True))
    equal = [name for name in names if name.startswith("micro_")] if record.classes else []
    shown = [name for name in names if name not in equal]
    table = [[name, *(run.measured(f"{split}/{name}") for split in record.splits)] for name in shown]
    blocks.append(Table("Metrics", ["metric", *record.splits], table))
    blocks.append(Note(_how_measured(run, bool(equal), best)))
    return Section("Summary", blocks)


def _how_measured(run: Run, micro: bool, best: dict[str, Any]) -> str:
    text = ""
    if best:
        text += f"Kept are the weights of step {best['step']:,}, by {best['metric']} ({best['value']:.4f}). "
        if "test" in run.record.splits:
            text += "Validation chose them, so its own numbers flatter; test chose nothing. "
    if any(run.intervals.values()):
        text += (
            "In brackets: 95 % intervals over the rows of the split (Wilson for shares of rows, bootstrap with 1,000 "
            "resamples for the others); they do not cover what another seed would change. "
        )
    return text + ("Micro averages equal the accuracy, as each row has one class." if micro else "")


def learning_curves(run: Run) -> Section | None:
    """Losses, the metric on validation, and learning rates over steps."""
    record = run.record
    best = record.facts.get("training", {}).get("best") or {}
    names = sorted({name for line in record.history for name in line})
    shown = [f"validation/{name}" for name in record.primary_metrics]
    metric = best.get("metric", shown[0] if shown else "validation/loss")
    others = [name for name in dict.fromkeys((metric, *shown)) if not name.endswith("/loss")]
    panels = [
        ("loss", ["train/loss", "validation/loss"], "loss", False),
        ("validation metrics", others, "score", False),
        ("learning rate", [name for name in names if name.startswith("lr/")], "learning rate", True),
    ]
    drawn = []
    for what, wanted, axis, log in panels:
        found = {name: record.curve(name) for name in wanted if record.curve(name)[0]}
        if not found:
            continue
        ends = ", ".join(f"{name} from {ys[0]:.3g} to {ys[-1]:.3g}" for name, (_, ys) in found.items())
        mark = best.get("step") if what != "learning rate" else None
        log = log and all(value > 0 for _, ys in found.values() for value in ys)
        svg = figures.lines(found, f"{what} by step: {ends}", x="step", y=axis, mark=mark, log=log)
        drawn.append(Figure(svg, what.capitalize() + (", dotted: the weights that were kept" if mark else "")))
    return Section("Learning curves", [Figures(drawn)]) if drawn else None


def data(run: Run) -> Section | None:
    """Rows and classes of each split, and how long or large rows are."""
    record, rows = run.record, run.rows
    counted = record.facts.get("rows", {})
    blocks: list[Any] = [Table("Rows", ["split", "rows"], [[split, count] for split, count in counted.items()])]
    drawn, counts = [], rows.class_counts()
    if counts:
        names = record.labels
        alt = "Share of each class in " + ", ".join(counts)
        drawn.append(Figure(figures.shares(counts, names, alt), "Classes, % of each split"))
        first = next(iter(counts.values()))
        order = np.argsort(-first, kind="stable")[:CLASSES_LISTED] if len(names) > 20 else range(len(names))
        table = [[names[k], *(int(found[k]) for found in counts.values())] for k in order]
        of = f" ({len(table)} of {len(names)})" if len(table) < len(names) else ""
        blocks.append(Table(f"Rows of each class{of}", ["class", *counts], table))
    split = next(iter(rows.splits), None)
    if split and (rows.image_column or rows.text_columns):
        unit, found, measured = rows.sizes(split)
        if measured:
            some = f"{measured:,} of {len(rows.splits[split]):,} rows of {split}"
            middle = ", ".join(f"{name}: median {np.median(values):g} {unit}" for name, values in found.items())
            svg = figures.histogram(found, f"Histogram of {unit}. {middle}", x=unit)
            drawn.append(Figure(svg, f"{middle} ({some})"))
    if drawn:
        blocks.insert(0, Figures(drawn))
    if rows.missing:
        blocks.insert(0, Note(rows.missing, warning=True))
    return Section("Data", blocks)


def training(run: Run) -> Section:
    """Parameters, time, memory and what was verified."""
    facts = run.record.facts
    adapted, made = facts.get("adapt", {}), facts.get("training", {})
    parts = ("backbone", "backbone_trainable", "adapters", "head", "trainable", "total")
    parameters: list[list[Cell]] = [[part.replace("_", ", "), adapted[part]] for part in parts if part in adapted]
    cost: list[list[Cell]] = [["steps", made.get("steps")]]
    if "seconds" in made:
        cost.append(["training, evaluations included", duration(made["seconds"])])
    for where in ("resident", "device"):
        if made.get(f"peak_{where}_bytes"):
            cost.append([f"peak memory, {where}, main process", mebibytes(made[f"peak_{where}_bytes"])])
    blocks: list[Any] = [
        Table(f"Parameters (method {adapted.get('method', 'unknown')})", ["part", "parameters"], parameters),
        Table("Time and memory", ["what", "measured"], cost),
    ]
    if made.get("selection"):
        blocks.append(_selection(made["selection"]))
    verified = facts.get("verified", {})
    if verified:
        table = [[name, Quantity(f"{value:.2g}")] for name, value in verified.items()]
        head = ["opened with", "largest logit difference"]
        blocks.append(Table("Saved model, opened again", head, table))
    return Section("Training", blocks)


def _selection(chosen: dict[str, Any]) -> Table:
    """What cross-validation tried, best first."""
    names = list(chosen["tried"][0])
    order = sorted(chosen["tried"], key=lambda tried: (-tried["accuracy"], tried["loss"]))
    caption = (
        f"{chosen['head']}: {chosen['folds']}-fold cross-validation on {chosen['rows']:,} training rows, best first"
    )
    return Table(
        caption,
        names,
        [[f"{tried[name]:g}" if i == 0 else tried[name] for i, name in enumerate(names)] for tried in order],
    )


def setting(run: Run) -> Section:
    """Configuration and environment."""
    environment = dict(run.record.environment)
    packages = environment.pop("packages", {})
    blocks = [
        Table("Environment", ["what", "value"], [[name, str(value)] for name, value in environment.items()]),
        Table("Packages", ["package", "version"], [[name, str(value)] for name, value in packages.items()]),
        Code("Configuration", (run.record.folder / "config.yaml").read_text(encoding="utf-8")),
    ]
    return Section("Configuration and environment", blocks)


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    summary,
    conclusion,
    learning_curves,
    classes,
    confusion_section,
    calibration,
    labels,
    numbers,
    errors,
    masks,
    data,
    training,
    setting,
)
