"""`hftl check`: everything that can be known about data before a model learns from them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.atomic_files import output_folder, write_text
from hftl.audit.class_balance import Labels, imbalance, read_labels, unlabelled
from hftl.audit.clean import LEFT_OUT, folder_problem, rows_to_leave_out, write_cleaned
from hftl.audit.duplicates import Groups, conflicts, duplicates, leaks, near
from hftl.audit.finding import FINDINGS, Finding, Numbering, format_counts
from hftl.audit.report import Shown, write_findings
from hftl.audit.scan import ImageSurvey, TextSurvey, words_as_texts
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
"""Findings that `--fail_on` without names means: those that break a run or the figures it prints."""
NEED_MODEL = ("too_long", "label_errors", "outliers")
"""Findings that are not looked for without a model."""
NEED_CLASSES = ("unlabelled", "conflicting_labels", "class_imbalance", "label_errors")
"""Findings that are not looked for where labels are not one class per row."""
PAGE, TABLE = "check.html", "check.json"


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    findings: tuple[Finding, ...]
    """One of each kind that images or texts can have, in the order of `FINDINGS`."""
    failed: tuple[str, ...]
    """Names of those in `fail_on` that found something."""
    page: Path
    """The HTML page; check.json lies beside it."""
    left_out: dict[str, dict[int, str]]
    """Rows that the cleaned copy lacks, with the reason, by split; empty without `fix`."""

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
    """Looks at all rows of a source, says what it found, and writes check.html and check.json.

    Rows are numbered as the source has them, from 0 in each split. Nothing is changed: `fix` writes a copy.

    Args:
        data: A source as in `data.source`, or a whole data section.
        model: As `model.name`; without one, what takes a model is left out (`NEED_MODEL`).
        output: Folder for page and table; made where it is missing.
        fix: A new folder for a cleaned copy (the rules: `hftl.audit.clean`).
        fail_on: Names of findings that make the result a failure; an empty list means `SERIOUS`, None nothing.

    Raises:
        ConfigError: A name in `fail_on` is unknown, needs a model, or does not apply to the labels; a folder cannot be
            used.
        DataError: The data cannot be opened, or hold neither images nor texts.
        ModelError: The model cannot be found or built.
    """
    config = data if isinstance(data, DataConfig) else DataConfig(source=str(data))
    names = SERIOUS if fail_on is not None and not fail_on else tuple(fail_on or ())
    _refuse(names, model, fix, config.source)
    folder = output_folder(output)
    # rows as the source has them: a validation split that hftl would cut is not there yet
    splits = replace(
        load_splits(replace(config, validation_fraction=0.0, max_train_samples_per_class=None)), lenient=True
    )
    task = _task_of(splits)
    _refuse_class_checks(fail_on or (), task)
    splits = words_as_texts(splits)
    numbering = Numbering({split: len(rows) for split, rows in splits.items()})
    seen = survey(splits, numbering)
    labels = read_labels(splits, numbering, task)
    groups = Groups(seen.keys, seen.verbatim, seen.usable, seen.verbatim_is)
    found = [*seen.findings, unlabelled(labels, numbering), imbalance(labels, numbering)]
    found += [make(groups, labels, numbering) for make in (leaks, duplicates, conflicts)]
    pairs, how = seen.near(np.flatnonzero(seen.usable & (groups.first == np.arange(len(numbering)))))
    found += [near(pairs, labels, numbering, how, across) for across in (True, False)]
    found += _by_model(splits, model, seen, labels, numbering, groups.first)
    findings = tuple(sorted(found, key=lambda finding: list(FINDINGS).index(finding.name)))
    _say(findings)
    left_out = _fix(fix, splits, seen, groups, labels, numbering)
    failed = tuple(finding.name for finding in findings if finding.name in names and finding.found)
    shown = Shown(splits, seen.columns, seen.images, labels, numbering)
    page = write_findings(folder / PAGE, shown, findings, model)
    _write_table(folder / TABLE, splits, model, findings, failed, left_out)
    log(f"check: {page} and {TABLE}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return Checked(findings, failed, page, left_out)


def _refuse(names: Sequence[str], model: str | None, fix: str | None, source: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("check: it looks at the data in one process; call it without a launcher.")
    problems = [
        f"--fail_on: '{name}' was renamed to '{OLD_FINDINGS[name]}'."
        if name in OLD_FINDINGS
        else f"--fail_on: there is no finding '{name}' (findings: {', '.join(FINDINGS)}).{nearest(name, FINDINGS)}"
        for name in names
        if name not in FINDINGS
    ]
    problems += [
        f"--fail_on: {name} is not looked for without a model; name one by --model."
        for name in names
        if name in NEED_MODEL and model is None
    ]
    place = folder_problem(fix, source) if fix is not None else None
    if problems or place:
        raise ConfigError(*problems, *([place] if place else []))


def _task_of(splits: Splits) -> Task | None:
    """Returns the task that `task: auto` finds for the splits; None where their columns or labels fit none."""
    try:
        with suppress_logs():
            return infer_task(splits)(splits)
    except DataError:  # the findings say what is wrong with the data
        return None


def _refuse_class_checks(names: Sequence[str], task: Task | None) -> None:
    """Raises ConfigError if `--fail_on` names a finding that the task's labels do not have."""
    wanted = [name for name in names if name in NEED_CLASSES]
    unfit = unsupported(task, Capability.CLASS_CHECKS) if wanted and task is not None else ""
    if unfit:
        raise ConfigError(f"--fail_on: {', '.join(wanted)}: {unfit}")


def survey(splits: Splits, numbering: Numbering) -> TextSurvey | ImageSurvey:
    """Looks at images where there is an image column, else at texts: the order of `hftl.tasks.auto_task`.

    Args:
        splits: All rows.
        numbering: Of their rows.

    Raises:
        DataError: There is neither an image column nor a text column.
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
            log(f"check: texts beside them ({', '.join(texts)}) are not looked at: rows of one image are duplicates")
        return ImageSurvey(splits, numbering, column.name)
    try:
        text, pair = find_text_columns(features, config.text_column, config.text_pair_column)
    except DataError as error:
        raise DataError(*problems, *error.problems) from error
    columns = [text.name, *([pair.name] if pair else [])]
    log(f"check: texts from {' and '.join(repr(name) for name in columns)} ({text.why})")
    return TextSurvey(splits, numbering, columns)


def _by_model(
    splits: Splits,
    model: str | None,
    survey: TextSurvey | ImageSurvey,
    labels: Labels,
    numbering: Numbering,
    twins: Any,
) -> list[Finding]:
    if model is None:
        names = [name for name in NEED_MODEL if not (survey.images and name == "too_long")]
        return [Finding(name, "Not looked for: it takes a model (--model).", looked=False) for name in names]
    from hftl.audit.model_checks import ModelChecks, label_errors, outliers

    look = ModelChecks(splits, model, survey.images, numbering.rows(sorted(survey.unusable)))
    too_long = [] if survey.images else [look.too_long()]
    features = look.features()
    if isinstance(features, str):
        names = ("label_errors", "outliers")
        return [*too_long, *(Finding(name, f"Not looked for: {features}", looked=False) for name in names)]
    wrong = label_errors(features, look.usable, labels, numbering, twins)
    return [*too_long, wrong, outliers(features, look.usable)]


def _say(findings: Sequence[Finding]) -> None:
    width = max(map(len, FINDINGS))
    for finding in findings:
        if not finding.looked:
            continue
        log(f"{finding.name:<{width}}  {finding.said}")
        for problem in finding.problems:
            log(f"{'':<{width}}  {problem}")
    unseen = [finding for finding in findings if not finding.looked]
    for sentence in dict.fromkeys(finding.sentence for finding in unseen):
        about = ", ".join(finding.name for finding in unseen if finding.sentence == sentence)
        log(f"({about}: {sentence})")


def _fix(
    fix: str | None,
    splits: Splits,
    survey: TextSurvey | ImageSurvey,
    groups: Groups,
    labels: Labels,
    numbering: Numbering,
) -> dict[str, dict[int, str]]:
    if fix is None:
        return {}
    unusable = dict(survey.unusable)
    if not labels.why_not:
        unusable |= {int(number): "no label" for number in np.flatnonzero(labels.codes < 0) if number not in unusable}
    left_out = rows_to_leave_out(unusable, groups, labels, numbering)
    how = write_cleaned(splits, left_out, fix)
    counts = {split: len(rows) for split, rows in left_out.items() if rows}
    without = f" without {format_counts(counts)}" if counts else ""
    log(f"fix: {fix} holds the data{without}, as {how}")
    log(f"fix: left out are, of {LEFT_OUT}")
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
