"""Sections of a comparison page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Quantity, Section, Table
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.run_record import RunRecord

_IGNORED_SETTINGS = {"output_dir", "overwrite", "problems"}


def compare_sections(records: Sequence[RunRecord]) -> list[Section]:
    """Returns the sections; the first one starts with warnings about incomparable runs."""
    names = unique_names(records)
    sections = [
        results(records, names),
        paired_comparison(records, names),
        overlaid_curves(records, names),
        setting_differences(records, names),
    ]
    return [section for section in sections if section]


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Returns the shortest path suffixes that distinguish the run folders."""
    parts = [record.folder.resolve().parts for record in records]
    longest = max(len(path) for path in parts)
    for depth in range(1, longest):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len({record.folder.resolve() for record in records}):
            return names
    return ["/".join(path) for path in parts]


def row_warnings(records: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Returns warnings about runs that were evaluated on different splits or rows."""
    warnings = []
    splits = {name: record.main_split or "no split" for name, record in zip(names, records, strict=True)}
    if len(set(splits.values())) > 1:
        listed = ", ".join(f"{name} on {split}" for name, split in splits.items())
        warnings.append(f"The runs were evaluated on different splits: {listed}.")
    predictions = [record.answers.get(record.main_split or "") for record in records]
    unknown = [name for name, each in zip(names, predictions, strict=True) if each is None]
    if unknown:
        warnings.append(f"The evaluated rows of {', '.join(unknown)} are unknown: there are no targets on disk.")
    groups: dict[Any, list[str]] = {}
    for name, record, each in zip(names, records, predictions, strict=True):
        if each is not None:
            groups.setdefault((each.fingerprint, tuple(record.labels)), []).append(f"{name} ({len(each.rows):,})")
    if len(groups) > 1:
        listed = "; ".join(", ".join(group) for group in groups.values())
        warnings.append(
            f"The runs were evaluated on different rows (number of rows in brackets): {listed}. Differences of their "
            "metrics may result from the rows alone."
        )
    return warnings


def results(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Returns method, cost and metrics of each run."""
    metrics = list(dict.fromkeys(f"{r.main_split}/{m}" for r in records for m in (*r.primary_metrics, "loss")))
    available = {name for record in records for name in record.metrics}
    metrics = [name for name in metrics if name in available] or sorted(available)[:3]
    table: list[list[Cell]] = []
    for name, record in zip(names, records, strict=True):
        intervals = record.intervals(record.main_split) if record.main_split else {}
        parameters, training = record.facts.get("adapt", {}), record.facts.get("training", {})
        row: list[Cell] = [name, record.settings.get("adapt.method")]
        for metric in metrics:
            split, _, metric_name = metric.partition("/")
            interval = intervals.get(metric_name) if split == record.main_split else None
            row.append(Measured(record.metrics.get(metric), interval))
        memory = training.get("peak_device_bytes") or training.get("peak_resident_bytes")
        row += [parameters.get("trainable"), training.get("steps")]
        row.append(duration(training["seconds"]) if "seconds" in training else None)
        row.append(mebibytes(memory) if memory else None)
        table.append(row)
    head = ["run", "method", *metrics, "trainable parameters", "steps", "time", "peak memory"]
    blocks: list[Any] = [Note(text, warning=True) for text in row_warnings(records, names)]
    blocks.append(Table("Runs", head, table))
    blocks += seed_statistics(records, metrics)
    blocks.append(
        Note(
            "In brackets: 95 % intervals over the rows of the split (Wilson for accuracy, bootstrap for the others). "
            "Peak memory: device memory, or resident memory of runs on the CPU."
        )
    )
    return Section("Results", blocks)


def seed_statistics(records: Sequence[RunRecord], metrics: Sequence[str]) -> list[Table]:
    """Returns mean and standard deviation over runs that differ only in the seed."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        values = {n: v for n, v in record.settings.items() if n not in _IGNORED_SETTINGS | {"train.seed"}}
        groups.setdefault(repr(sorted(values.items(), key=str)), []).append(record)
    table: list[list[Cell]] = []
    for group in groups.values():
        seeds = sorted({str(record.settings.get("train.seed")) for record in group})
        if len(seeds) < 2 or len(seeds) < len(group):
            continue
        row: list[Cell] = [group[0].settings.get("adapt.method"), ", ".join(seeds)]
        for metric in metrics:
            values = [value for record in group if (value := record.metrics.get(metric)) is not None]
            is_complete = len(values) == len(group)
            row.append(Quantity(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}") if is_complete else None)
        table.append(row)
    caption = "Over seeds: mean ± std of runs that differ only in the seed"
    return [Table(caption, ["method", "seeds", *metrics], table)] if table else []


def paired_comparison(records: Sequence[RunRecord], names: Sequence[str]) -> Section | None:
    """Returns McNemar tests of each run against the first one on the same rows; None without comparable runs."""
    from scipy.stats import binomtest

    first = records[0].class_predictions.get(records[0].main_split or "")
    if first is None or len(records) < 2:
        return None
    table: list[list[Cell]] = []
    first_correct = first.labels == first.predictions
    for name, record in zip(names[1:], records[1:], strict=True):
        second = record.class_predictions.get(record.main_split or "")
        if second is None or second.fingerprint != first.fingerprint or record.classes != records[0].classes:
            continue
        correct = second.labels == second.predictions
        gained, lost = int((correct & ~first_correct).sum()), int((first_correct & ~correct).sum())
        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        difference = Quantity(f"{(gained - lost) / len(first_correct):+.4f}")
        table.append([name, gained, lost, difference, Quantity(f"{p:.4f}" if p >= 0.0001 else "< 0.0001")])
    if not table:
        return None
    about = (
        f"Of {len(first_correct):,} rows: correct only in this run, or only in {names[0]}. p: exact McNemar test of "
        "equal error rates, not corrected for multiple comparisons."
    )
    head = ["run", "only this run correct", "only the first correct", "difference in accuracy", "p"]
    blocks = [Table("Per-example agreement (McNemar)", head, table), Note(about)]
    return Section(f"Paired comparison with {names[0]}", blocks)


def overlaid_curves(records: Sequence[RunRecord], names: Sequence[str]) -> Section | None:
    """Returns the learning curves of all runs in common figures; None without curves."""
    best = (records[0].facts.get("training", {}).get("best") or {}).get("metric", "validation/accuracy")
    plots = []
    for quantity in dict.fromkeys((best, "validation/loss", "train/loss")):
        curves = {name: record.curve(quantity) for name, record in zip(names, records, strict=True)}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if curves:
            ends = ", ".join(f"{name} ends at {ys[-1]:.3g}" for name, (_, ys) in curves.items())
            svg = figures.line_plot(curves, f"{quantity} by step: {ends}", x="step", y=quantity)
            plots.append(Figure(svg, quantity))
    return Section("Learning curves", [Figures(plots)]) if plots else None


def setting_differences(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Returns settings, environment and package versions that differ between runs."""
    settings = [{n: str(v) for n, v in record.settings.items() if n not in _IGNORED_SETTINGS} for record in records]
    environments = []
    for record in records:
        environment = dict(record.environment)
        packages = environment.pop("packages", {})
        environments.append({n: str(v) for n, v in (environment | packages).items()})
    blocks = []
    for caption, runs in (("Configuration", settings), ("Environment", environments)):
        keys = list(dict.fromkeys(key for values in runs for key in values))
        differing = [key for key in keys if len({values.get(key) for values in runs}) > 1]
        table = [[key, *(values.get(key, "–") for values in runs)] for key in differing]
        blocks.append(Table(caption, ["setting", *names], table) if table else Note(f"{caption}: no difference."))
    return Section("Differences", blocks)
