"""The sections of a page that puts runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Quantity, Section, Table
from hftl.html.formatting import duration, mebibytes
from hftl.reporting.run_record import RunRecord

_SAYS_NOTHING = {"output_dir", "overwrite", "problems"}
_SAME_EACH = {"train.seed"}


def compare_sections(records: Sequence[RunRecord]) -> list[Section]:
    """Returns the sections; what cannot be compared is said first."""
    names = unique_names(records)
    made = [
        results(records, names),
        paired(records, names),
        overlaid_curves(records, names),
        setting_differences(records, names),
    ]
    return [section for section in made if section]


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Returns folder names, with as much of the path before them as tells them apart."""
    parts = [record.folder.resolve().parts for record in records]
    longest = max(len(path) for path in parts)
    for depth in range(1, longest):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len({record.folder.resolve() for record in records}):
            return names
    return ["/".join(path) for path in parts]


def row_warnings(records: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Returns why numbers of these runs may not be compared: other splits, or other rows in the split."""
    out = []
    splits = {name: record.main_split or "nothing" for name, record in zip(names, records, strict=True)}
    if len(set(splits.values())) > 1:
        said = ", ".join(f"{name} on {split}" for name, split in splits.items())
        out.append(f"These runs were not measured on the same split: {said}.")
    judged = [record.answers.get(record.main_split or "") for record in records]
    unknown = [name for name, found in zip(names, judged, strict=True) if found is None]
    if unknown:
        out.append(f"Whether rows are the same cannot be told for {', '.join(unknown)}: no true labels on disk.")
    groups: dict[Any, list[str]] = {}
    for name, record, found in zip(names, records, judged, strict=True):
        if found is not None:
            groups.setdefault((found.fingerprint, tuple(record.labels)), []).append(f"{name} ({len(found.rows):,})")
    if len(groups) > 1:
        said = "; ".join(", ".join(group) for group in groups.values())
        out.append(
            f"These runs were not measured on the same rows (rows in brackets): {said}. Differences between their "
            "numbers may come from the rows alone."
        )
    return out


def results(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Method, cost and metrics of each run."""
    metrics = list(dict.fromkeys(f"{r.main_split}/{m}" for r in records for m in (*r.primary_metrics, "loss")))
    found = {name for record in records for name in record.metrics}
    metrics = [name for name in metrics if name in found] or sorted(found)[:3]
    intervals = [record.intervals(split) if (split := record.main_split) else {} for record in records]
    table: list[list[Cell]] = []
    for name, record, known in zip(names, records, intervals, strict=True):
        adapted, training = record.facts.get("adapt", {}), record.facts.get("training", {})
        row: list[Cell] = [name, record.settings.get("adapt.method")]
        for metric in metrics:
            split, _, short = metric.partition("/")
            interval = known.get(short) if split == record.main_split else None
            row.append(Measured(record.metrics.get(metric), interval))
        memory = training.get("peak_device_bytes") or training.get("peak_resident_bytes")
        row += [adapted.get("trainable"), training.get("steps")]
        row.append(duration(training["seconds"]) if "seconds" in training else None)
        row.append(mebibytes(memory) if memory else None)
        table.append(row)
    head = ["run", "method", *metrics, "trained", "steps", "time", "peak memory"]
    blocks: list[Any] = [Note(text, warning=True) for text in row_warnings(records, names)]
    blocks.append(Table("Runs", head, table))
    blocks += over_seeds(records, metrics)
    blocks.append(
        Note(
            "In brackets: 95 % intervals over the rows of the split (Wilson for accuracy, bootstrap for the others). "
            "Peak memory: on the device where there is one, else resident."
        )
    )
    return Section("Results", blocks)


def over_seeds(records: Sequence[RunRecord], metrics: Sequence[str]) -> list[Table]:
    """Returns mean and standard deviation over runs that differ in nothing but the seed."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        values = {n: v for n, v in record.settings.items() if n not in _SAYS_NOTHING | _SAME_EACH}
        groups.setdefault(repr(sorted(values.items(), key=str)), []).append(record)
    table: list[list[Cell]] = []
    for group in groups.values():
        seeds = sorted({str(record.settings.get("train.seed")) for record in group})
        if len(seeds) < 2 or len(seeds) < len(group):
            continue
        row: list[Cell] = [group[0].settings.get("adapt.method"), ", ".join(seeds)]
        for metric in metrics:
            values = [value for record in group if (value := record.metrics.get(metric)) is not None]
            whole = len(values) == len(group)
            row.append(Quantity(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}") if whole else None)
        table.append(row)
    caption = "Over seeds: mean ± standard deviation of runs that differ in nothing else"
    return [Table(caption, ["method", "seeds", *metrics], table)] if table else []


def paired(records: Sequence[RunRecord], names: Sequence[str]) -> Section | None:
    """Each run against the first on the same rows: which of the two was right where only one was."""
    from scipy.stats import binomtest

    first = records[0].judged.get(records[0].main_split or "")
    if first is None or len(records) < 2:
        return None
    table: list[list[Cell]] = []
    right = first.labels == first.predictions
    for name, record in zip(names[1:], records[1:], strict=True):
        other = record.judged.get(record.main_split or "")
        if other is None or other.fingerprint != first.fingerprint or record.classes != records[0].classes:
            continue
        also = other.labels == other.predictions
        gained, lost = int((also & ~right).sum()), int((right & ~also).sum())
        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        row: list[Cell] = [name, gained, lost, Quantity(f"{(gained - lost) / len(right):+.4f}"), _p(p)]
        table.append(row)
    if not table:
        return None
    about = (
        f"Of {len(right):,} rows: right in this run and wrong in {names[0]}, and the other way round. p: exact McNemar "
        "test that both ways are equally likely, of this pair alone; with several runs some p are small by chance."
    )
    head = ["run", "only this one right", "only the first right", "difference in accuracy", "p"]
    return Section(f"Against {names[0]}", [Table("Row by row", head, table), Note(about)])


def _p(value: float) -> Quantity:
    return Quantity(f"{value:.4f}" if value >= 0.0001 else "< 0.0001")


def overlaid_curves(records: Sequence[RunRecord], names: Sequence[str]) -> Section | None:
    """Learning curves over one another."""
    best = (records[0].facts.get("training", {}).get("best") or {}).get("metric", "validation/accuracy")
    drawn = []
    for quantity in dict.fromkeys((best, "validation/loss", "train/loss")):
        found = {name: record.curve(quantity) for name, record in zip(names, records, strict=True)}
        found = {name: curve for name, curve in found.items() if curve[0]}
        if found:
            ends = ", ".join(f"{name} ends at {ys[-1]:.3g}" for name, (_, ys) in found.items())
            svg = figures.lines(found, f"{quantity} by step: {ends}", x="step", y=quantity)
            drawn.append(Figure(svg, quantity))
    return Section("Learning curves", [Figures(drawn)]) if drawn else None


def setting_differences(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Settings and versions that are not the same in all runs."""
    settings = [{n: str(v) for n, v in record.settings.items() if n not in _SAYS_NOTHING} for record in records]
    around = []
    for record in records:
        found = dict(record.environment)
        packages = found.pop("packages", {})
        around.append({n: str(v) for n, v in (found | packages).items()})
    blocks = []
    for caption, values in (("Configuration", settings), ("Environment", around)):
        keys = list(dict.fromkeys(key for found in values for key in found))
        other = [key for key in keys if len({found.get(key) for found in values}) > 1]
        table = [[key, *(found.get(key, "–") for found in values)] for key in other]
        blocks.append(Table(caption, ["setting", *names], table) if table else Note(f"{caption}: no difference."))
    return Section("Differences", blocks)
