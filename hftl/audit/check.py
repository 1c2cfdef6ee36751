"""`hftl check`: audit of a dataset before training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.atomic_files import output_folder, write_text
from hftl.audit.class_balance import Labels, class_imbalance, read_labels, unlabelled
from hftl.audit.clean import LEFT_OUT, folder_problem, rows_to_leave_out, write_cleaned
from hftl.audit.duplicates import Groups, conflicting_labels, duplicates, leaks, near_duplicates
from hftl.audit.finding import FINDINGS, Finding, Numbering, format_counts, unchecked_by_reason
from hftl.audit.report import PageRows, write_findings
from hftl.audit.scan import ImageScan, TextScan, words_as_texts
from hftl.config.schema import DataConfig
from hftl.data.columns import find_column, find_text_columns
from hftl.data.roles import is_usual_name
from hftl.data.source import load_splits
from hftl.data.splits import Splits
from hftl.errors import ConfigError, DataError, nearest
from hftl.logging import log, suppress_logs
from hftl.redaction import redact
from hftl.renames import FINDINGS as OLD_FINDINGS
from hftl.tasks.auto_task import infer_task
from hftl.tasks.capabilities import Capability
from hftl.tasks.registry import unsupported
from hftl.tasks.task import Task
from hftl.version import __version__

SERIOUS = ("unreadable", "unlabelled", "leaks", "conflicting_labels")
"""Default findings of `--fail_on`: those that break a run or invalidate its metrics."""
NEED_MODEL = ("too_long", "label_errors", "outliers")
"""Findings that require a model."""
NEED_CLASSES = ("unlabelled", "conflicting_labels", "class_imbalance", "label_errors")
"""Findings that require single-label classes."""
PAGE, TABLE = "check.html", "check.json"


@dataclass(frozen=True)
class Checked:
    """Result of a check."""

    findings: tuple[Finding, ...]
    """One per kind that applies to the input type, in the order of `FINDINGS`."""
    failed: tuple[str, ...]
    """Names of the findings in `fail_on` that are not empty."""
    page: Path
    """HTML page; check.json is in the same folder."""
    left_out: dict[str, dict[int, str]]
    """Rows that the cleaned copy omits, with the reason, by split; empty without `fix`."""

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]


def check(
    data: str | DataConfig,
    model: str | None = None,
    *,
    output: str | Path = "check",
    fix: str | None = None,
    fail_on: Sequence[str] | None = None,
) -> Checked:
    """Scans all rows of a source, logs the findings, and writes check.html and check.json.

    Row numbers are those of the source, from 0 in each split. The data are not changed; `fix` writes a copy.

    Args:
        data: Source as in `data.source`, or a data configuration.
        model: As `model.name`; None skips the findings in `NEED_MODEL`.
        output: Folder for check.html and check.json; created if missing.
        fix: New folder for a cleaned copy (rules: `hftl.audit.clean`).
        fail_on: Names of findings that make the check fail if they are not empty. An empty list selects `SERIOUS`,
            None no finding.

    Raises:
        ConfigError: A name in `fail_on` is unknown, requires a model, or does not apply to the labels; a folder is
            invalid.
        DataError: The data cannot be opened, or contain neither images nor texts.
        ModelError: The model cannot be found or built.
    """
    config = data if isinstance(data, DataConfig) else DataConfig(source=str(data))
    names = SERIOUS if fail_on is not None and not fail_on else tuple(fail_on or ())
    _validate_arguments(names, model, fix, config.source)
    folder = output_folder(output)
    # rows as in the source, before hftl splits off validation rows
    splits = replace(
        load_splits(replace(config, validation_fraction=0.0, max_train_samples_per_class=None)), lenient=True
    )
    task = _task_of(splits)
    _require_class_checks(fail_on or (), task)
    splits = words_as_texts(splits)
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    scan = survey(splits, numbering)
    labels = read_labels(splits, numbering, task)
    groups = Groups(scan.keys, scan.verbatim, scan.usable, scan.verbatim_is)
    unsorted = [*scan.findings, unlabelled(labels, numbering), class_imbalance(labels, numbering)]
    unsorted += [find(groups, labels, numbering) for find in (leaks, duplicates, conflicting_labels)]
    pairs, method = scan.near_duplicates(np.flatnonzero(scan.usable & (groups.first == np.arange(len(numbering)))))
    unsorted += [near_duplicates(pairs, labels, numbering, method, across) for across in (True, False)]
    unsorted += _model_findings(splits, model, scan, labels, numbering, groups.first)
    findings = tuple(sorted(unsorted, key=lambda finding: list(FINDINGS).index(finding.name)))
    _log_findings(findings)
    left_out = _write_fix(fix, splits, scan, groups, labels, numbering)
    failed = tuple(finding.name for finding in findings if finding.name in names and finding.found)
    page_rows = PageRows(splits, scan.columns, scan.images, labels, numbering)
    page = write_findings(folder / PAGE, page_rows, findings, model)
    _write_table(folder / TABLE, splits, model, findings, failed, left_out)
    log(f"check: {page} and {TABLE}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return Checked(findings, failed, page, left_out)


def _validate_arguments(names: Sequence[str], model: str | None, fix: str | None, source: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("check: runs in one process only. Run it without a launcher.")
    problems = [
        f"--fail_on: '{name}' was renamed to '{OLD_FINDINGS[name]}'."
        if name in OLD_FINDINGS
        else f"--fail_on: '{name}' is invalid; allowed: {', '.join(FINDINGS)}.{nearest(name, FINDINGS)}"
        for name in names
        if name not in FINDINGS
    ]
    problems += [
        f"--fail_on: '{name}' requires a model. Pass --model." for name in names if name in NEED_MODEL and model is None
    ]
    fix_problem = folder_problem(fix, source) if fix is not None else None
    if problems or fix_problem:
        raise ConfigError(*problems, *([fix_problem] if fix_problem else []))


def _task_of(splits: Splits) -> Task | None:
    """Returns the task that `task: auto` detects; None if no task fits the columns or labels."""
    try:
        with suppress_logs():
            return infer_task(splits)(splits)
    except DataError:  # the findings report the problems of the data
        return None


def _require_class_checks(names: Sequence[str], task: Task | None) -> None:
    """Raises ConfigError if `--fail_on` contains a finding that does not apply to the labels of the task."""
    class_findings = [name for name in names if name in NEED_CLASSES]
    problem = unsupported(task, Capability.CLASS_CHECKS) if class_findings and task is not None else ""
    if problem:
        raise ConfigError(f"--fail_on: {', '.join(class_findings)}: {problem}")


def survey(splits: Splits, numbering: Numbering) -> TextScan | ImageScan:
    """Scans images if the data have an image column, else texts (the order of `hftl.tasks.auto_task`).

    Args:
        splits: All rows.
        numbering: Row numbers over all splits.

    Raises:
        DataError: The data have neither an image column nor a text column.
    """
    features, config = splits["train"].features, splits.config
    problems: list[str] = []
    try:
        column = find_column("image", features, config.image_column)
    except DataError as error:
        problems += error.problems
    else:
        log(f"check: images from column '{column.name}' ({column.why})")
        texts = [name for name in features if is_usual_name("text", name)]
        if texts:
            log(f"check: ignored text column(s) {', '.join(texts)}; rows with equal images are duplicates")
        return ImageScan(splits, numbering, column.name)
    try:
        text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
    except DataError as error:
        raise DataError(*problems, *error.problems) from error
    columns = [text.name, *([pair.name] if pair else [])]
    log(f"check: texts from column(s) {' and '.join(repr(name) for name in columns)} ({text.why})")
    return TextScan(splits, numbering, columns)


def _model_findings(
    splits: Splits,
    model: str | None,
    scan: TextScan | ImageScan,
    labels: Labels,
    numbering: Numbering,
    first_duplicates: Any,
) -> list[Finding]:
    if model is None:
        names = [name for name in NEED_MODEL if not (scan.images and name == "too_long")]
        return [Finding(name, "Not checked: requires a model (--model).", checked=False) for name in names]
    from hftl.audit.model_checks import ModelChecks, label_errors, outliers

    checks = ModelChecks(splits, model, scan.images, numbering.rows(sorted(scan.unusable)))
    too_long = [] if scan.images else [checks.too_long()]
    features = checks.features()
    if isinstance(features, str):
        names = ("label_errors", "outliers")
        return [*too_long, *(Finding(name, f"Not checked: {features}", checked=False) for name in names)]
    errors = label_errors(features, checks.usable, labels, numbering, first_duplicates)
    return [*too_long, errors, outliers(features, checks.usable)]


def _log_findings(findings: Sequence[Finding]) -> None:
    width = max(map(len, FINDINGS))
    for finding in findings:
        if not finding.checked:
            continue
        log(f"{finding.name:<{width}}  {finding.count_text}")
        for problem in finding.problems:
            log(f"{'':<{width}}  {problem}")
    for names, reason in unchecked_by_reason(findings).items():
        log(f"({', '.join(names)}: {reason})")


def _write_fix(
    fix: str | None,
    splits: Splits,
    scan: TextScan | ImageScan,
    groups: Groups,
    labels: Labels,
    numbering: Numbering,
) -> dict[str, dict[int, str]]:
    if fix is None:
        return {}
    unusable = dict(scan.unusable)
    if not labels.why_not:
        unusable |= {int(number): "no label" for number in np.flatnonzero(labels.codes < 0) if number not in unusable}
    left_out = rows_to_leave_out(unusable, groups, labels, numbering)
    layout = write_cleaned(splits, left_out, fix)
    counts = {split: len(rows) for split, rows in left_out.items() if rows}
    without = f" without {format_counts(counts)}" if counts else ""
    log(f"check: wrote a cleaned copy to {fix}{without}, as {layout}")
    log(f"check: rules of removal: {LEFT_OUT}")
    return left_out


def _write_table(
    path: Path,
    splits: Splits,
    model: str | None,
    findings: Sequence[Finding],
    failed: Sequence[str],
    left_out: dict[str, dict[int, str]],
) -> None:
    table = {
        "data": redact(splits.config.source),
        "model": model,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "failed": list(failed),
        "findings": [finding.state() for finding in findings],
        "left_out": left_out,
        "hftl": __version__,
    }
    try:
        write_text(path, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--output: '{path}' cannot be written: {error.strerror or error}.") from error
