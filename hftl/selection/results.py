"""Comparison of run folders: results by method, paired differences, cost and conclusion. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.errors import ArtifactError, HftlError, first_line
from hftl.reporting.run_record import RunRecord
from hftl.selection.experiment_plan import METHODS, SCRATCH
from hftl.statistics.score_difference import Difference, difference, required_samples, round_up

_Runs = Mapping[int, RunRecord]
"""Runs of a method by seed."""


@dataclass(frozen=True)
class Failure:
    """Run without a result."""

    seed: int
    reason: str


@dataclass(frozen=True)
class MethodResult:
    """Runs of a training method, their cost, and the difference from the baseline."""

    method: str
    runs: list[str]
    """Names of the run folders."""
    seeds: list[int]
    scores: list[float]
    """Mean score over the rows of each run."""
    validation: float | None
    """Validation metric that selects the best method, mean over the runs."""
    validation_loss: float | None
    """Validation loss, mean over the runs."""
    seconds: float | None
    """Training time in seconds including evaluations, mean over the runs."""
    peak_bytes: int | None
    """Peak memory in bytes, maximum over the runs: device memory, or resident memory without a device."""
    trainable: int | None
    """Number of trainable parameters."""
    difference: Difference | None = None
    """Difference from the baseline; None for the baseline, or without results."""
    failures: list[Failure] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Mean score over the runs; NaN without runs."""
        return float(np.mean(self.scores)) if self.scores else float("nan")


@dataclass(frozen=True)
class CostSaving:
    """Score difference between the most expensive and the simplest adaptation method."""

    simplest: str
    most_expensive: str
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """Comparison of training methods on the same rows."""

    data: str
    model: str
    split: str
    rows: int
    """Number of evaluated rows."""
    metric: str
    budget: str
    """Training budget shared by all methods, as text."""
    results: list[MethodResult]
    baseline: str | None
    """Method that the others are compared with: scratch if it has results, else the simplest."""
    chosen: str | None
    """Best of the other methods on validation; the conclusion refers to it."""
    kept: str | None
    """Best run on validation, of all methods."""
    cost_saving: CostSaving | None = None
    conclusion: str | None = None
    """helped, hurt, better, worse or not distinguishable; None without results of both methods."""
    sentence: str = ""
    """Conclusion as text, with intervals."""
    warnings: list[str] = field(default_factory=list)
    """Limitations of the comparison."""

    def result(self, method: str | None) -> MethodResult:
        """Returns the result of a method.

        Raises:
            KeyError: The method is not part of the comparison.
        """
        return {result.method: result for result in self.results}[method or ""]

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values."""
        return _finite(asdict(self))


def judge(
    folders: Mapping[str, Mapping[int, Path]], split: str, budget: str, failures: Mapping[str, Sequence[Failure]]
) -> Comparison:
    """Compares the methods of run folders and returns results, differences and conclusion.

    Args:
        folders: Run folders by method and seed.
        split: Split on which the methods are compared.
        budget: Training budget shared by all methods, as text.
        failures: Runs without a folder, by method.

    Raises:
        ArtifactError: No run has results on that split.
    """
    records: dict[str, dict[int, RunRecord]] = {method: {} for method in folders}
    failed = {method: list(failures.get(method, ())) for method in folders}
    rows: tuple[str, int] | None = None
    for method, method_folders in folders.items():
        for seed, folder in method_folders.items():
            try:
                record = RunRecord(folder)
                record_rows = _rows(record, split)
                if rows is not None and record_rows != rows:
                    raise ArtifactError(f"'{folder}' was evaluated on other rows of {split} than the other runs.")
            except HftlError as error:
                failed[method].append(Failure(seed, first_line(error)))
                continue
            rows = record_rows
            records[method][seed] = record
    if rows is None:
        reasons = [f"{method}, seed {each.seed}: {each.reason}" for method, runs in failed.items() for each in runs]
        raise ArtifactError(f"no run of the comparison has a result: {'; '.join(reasons)}")
    baseline = next((method for method in (SCRATCH, *METHODS) if records.get(method)), None)
    results = [
        _result(method, runs, split, records[baseline] if baseline not in (None, method) else {}, failed[method])
        for method, runs in records.items()
    ]
    others = [result for result in results if result.scores and result.method != baseline]
    chosen = max(others, key=_method_validation).method if others else None
    all_records = [record for runs in records.values() for record in runs.values()]
    first = all_records[0]
    return conclude(
        Comparison(
            data=str(first.settings.get("data.source")),
            model=str(first.settings.get("model.name")),
            split=split,
            rows=rows[1],
            metric=first.answers[split].metric,
            budget=budget,
            results=results,
            baseline=baseline,
            chosen=chosen,
            kept=max(all_records, key=_validation).folder.name,
            cost_saving=_cost_saving(records, results, split),
        )
    )


def row_scores(record: RunRecord, split: str) -> Any:
    """Returns the score of each row of a split, [N] float64; larger is better (see `hftl.tasks.predictions`).

    Raises:
        ArtifactError: The run has no predictions of that split with labels.
    """
    predictions = record.answers.get(split)
    if predictions is None:
        raise ArtifactError(f"'{record.folder}' has no predictions with labels for {split}.")
    return predictions.scores


def _rows(record: RunRecord, split: str) -> tuple[str, int]:
    scores = row_scores(record, split)
    return record.answers[split].fingerprint, len(scores)


def _result(method: str, records: _Runs, split: str, baseline: _Runs, failures: list[Failure]) -> MethodResult:
    runs = list(records.values())
    training = [record.facts.get("training", {}) for record in runs]
    seconds = [facts["seconds"] for facts in training if "seconds" in facts]
    peaks = [facts.get("peak_device_bytes") or facts.get("peak_resident_bytes") for facts in training]
    validation = [_validation(record) for record in runs]
    return MethodResult(
        method,
        [record.folder.name for record in runs],
        list(records),
        [float(row_scores(record, split).mean()) for record in runs],
        float(np.mean([score for score, _ in validation])) if runs else None,
        float(np.mean([-loss for _, loss in validation])) if runs else None,
        float(np.mean(seconds)) if seconds else None,
        max((peak for peak in peaks if peak), default=None),
        runs[0].facts.get("adapt", {}).get("trainable") if runs else None,
        _difference(records, baseline, split),
        failures,
    )


def _difference(runs: _Runs, baseline: _Runs, split: str) -> Difference | None:
    """Returns the difference between two methods; None if one has no result."""
    if not runs or not baseline:
        return None
    return difference(*([row_scores(run, split) for run in records.values()] for records in (runs, baseline)))


def _cost_saving(records: Mapping[str, _Runs], results: Sequence[MethodResult], split: str) -> CostSaving | None:
    pretrained = [result for result in results if result.method != SCRATCH and result.scores]
    if len(pretrained) < 2:
        return None
    simplest, *_, most_expensive = sorted(pretrained, key=lambda result: METHODS.index(result.method))
    gain = _difference(records[most_expensive.method], records[simplest.method], split)
    return CostSaving(simplest.method, most_expensive.method, gain) if gain else None


def _validation(record: RunRecord) -> tuple[float, float]:
    """Returns the selection key of a run, larger is better: the compared metric on validation, then minus the loss."""
    predictions = next(iter(record.answers.values()), None)  # the metric is the same for all splits
    metrics = predictions.metric if predictions else "", "loss"
    score, loss = (record.metrics.get(f"validation/{metric}") for metric in metrics)
    return (-np.inf if score is None else score), (-np.inf if loss is None else -loss)


def _method_validation(result: MethodResult) -> tuple[float, float, int]:
    """Returns the selection key of a method: metric, minus loss, then the simplest method."""
    loss = np.inf if result.validation_loss is None else result.validation_loss
    return -np.inf if result.validation is None else result.validation, -loss, -METHODS.index(result.method)


def _finite(value: Any) -> Any:
    """Returns JSON values: None for NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


FEW_ROWS = 50
"""Minimum rows without a warning; fewer rows distinguish only large differences."""


def conclude(comparison: Comparison) -> Comparison:
    """Returns `comparison` with its conclusion, also as text, and warnings."""
    conclusion, sentence = _conclusion(comparison)
    return replace(comparison, conclusion=conclusion, sentence=sentence, warnings=_warnings(comparison))


def _conclusion(comparison: Comparison) -> tuple[str | None, str]:
    if comparison.chosen is None or comparison.baseline is None:
        method = next(result.method for result in comparison.results if result.scores)
        return None, f"No conclusion: only {method} has a result."
    chosen, baseline = comparison.result(comparison.chosen), comparison.result(comparison.baseline)
    gain = chosen.difference
    assert gain is not None, "both have results"
    others = [result.method for result in comparison.results if result.scores and result.method != baseline.method]
    selection = f" (best of {', '.join(others)} on validation)" if len(others) > 1 else ""
    details = (
        f"{chosen.method}{selection} {_percent(chosen.score)}, {baseline.method} {_percent(baseline.score)}; "
        f"{comparison.rows:,} rows, {_seeds(gain.seeds)}"
    )
    size = f"{abs(100 * gain.value):.1f} points of {comparison.split} {comparison.metric}"
    if gain.conclusion == "not distinguishable":
        return gain.conclusion, (
            f"Not distinguishable on this {comparison.split} size: {chosen.method} minus {baseline.method} is "
            f"{points(gain.value)} points of {comparison.metric} ({interval(gain)}). {_requirement(gain)} [{details}]"
        )
    if baseline.method == SCRATCH:
        effect = "helped" if gain.conclusion == "better" else "hurt"
        return effect, f"Transfer {effect} by {size} ({interval(gain, gain.value < 0)}): {details}."
    return gain.conclusion, (
        f"{chosen.method} is {gain.conclusion} than {baseline.method} by {size} "
        f"({interval(gain, gain.value < 0)}): {details}. The transfer gain is unknown without scratch."
    )


def _requirement(gain: Difference) -> str:
    if not gain.value:
        return "The measured difference is zero."
    required = required_samples(gain)
    options = []
    if required.rows is not None:
        options.append(f"about {round_up(required.rows):,} rows")
    if required.seeds is not None:
        options.append(f"about {required.seeds} seeds")
    if not options:
        resources = "rows" if gain.seeds == 1 else "rows and seeds"
        return f"Many more {resources} would be needed to distinguish a difference of this size from zero."
    needed = " or ".join(options)
    return f"{needed[0].upper()}{needed[1:]} would be needed to distinguish a difference of this size from zero."


def _warnings(comparison: Comparison) -> list[str]:
    warnings = []
    results = comparison.results
    if comparison.split != "test":
        warnings.append(
            f"There is no test split. The {comparison.split} split also selected best checkpoints and best method, so "
            "its metrics are optimistic."
        )
    if comparison.rows < FEW_ROWS:
        warnings.append(f"{comparison.rows} rows are few and distinguish only large differences from zero.")
    if any(result.difference and result.difference.seeds == 1 for result in results):
        warnings.append("One seed: the intervals cover rows only, not the variation over seeds.")
    if any(result.difference and result.difference.seeds == 2 for result in results):
        warnings.append(
            "Two seeds estimate the variation over seeds poorly and give wide intervals. Use at least three."
        )
    if comparison.baseline != SCRATCH and any(result.method == SCRATCH for result in results):
        warnings.append(f"Training from scratch has no result; the baseline is {comparison.baseline} instead.")
    for result in results:
        warnings += [f"{result.method}, seed {failure.seed}, failed: {failure.reason}" for failure in result.failures]
    saving = comparison.cost_saving
    if saving and saving.difference.conclusion == "not distinguishable":
        simplest, most_expensive = comparison.result(saving.simplest), comparison.result(saving.most_expensive)
        gain = saving.difference
        warnings.append(
            f"The simplest method is not distinguishable from the most expensive: {most_expensive.method} minus "
            f"{simplest.method} is {points(gain.value)} points ({interval(gain)}), at {_cost(most_expensive)} per run "
            f"against {_cost(simplest)}."
        )
    return warnings


def format_comparison(comparison: Comparison) -> str:
    """Returns a text table of the methods: score, difference from the baseline and cost."""
    columns = f"{comparison.split} {comparison.metric}", f"vs {comparison.baseline}, 95 % interval"
    header = ["method", *columns, "trainable parameters", "seconds per run", "peak memory"]
    lines = [header]
    for result in comparison.results:
        if not result.scores:
            lines.append([result.method, "failed", "", "", "", ""])
            continue
        gain = result.difference
        lines.append(
            [
                result.method,
                format_score(result),
                f"{points(gain.value)} points [{points(gain.low)}, {points(gain.high)}]" if gain else "",
                f"{result.trainable:,}" if result.trainable is not None else "",
                f"{result.seconds:.1f}" if result.seconds is not None else "",
                f"{result.peak_bytes / 2**20:,.0f} MiB" if result.peak_bytes else "",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "   ".join(cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    seeds = max(len(result.scores) for result in comparison.results)
    return "\n".join(line.rstrip() for line in aligned) + f"\n({footnote(comparison, seeds)})"


def footnote(comparison: Comparison, seeds: int) -> str:
    """Returns the definition of the numbers in the table."""
    mean = f"Mean ± standard deviation over {_seeds(seeds)}; " if seeds > 1 else ""
    return (
        f"{mean}{comparison.rows:,} rows; {comparison.budget}.\nDifferences: paired by row; intervals over rows and "
        "seeds, not corrected for multiple comparisons.\nSeconds: mean over seeds, including feature computation, also "
        "of cached features"
    )


def format_score(result: MethodResult) -> str:
    """Returns the mean score in percent, with the standard deviation over several seeds."""
    deviation = f" ± {100 * float(np.std(result.scores, ddof=1)):.1f}" if len(result.scores) > 1 else ""
    return f"{100 * result.score:.1f}{deviation} %"


def points(value: float) -> str:
    """Returns a difference in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def interval(gain: Difference, negated: bool = False) -> str:
    """Returns the interval of a difference as text; `negated` returns that of the opposite difference."""
    ends = (-gain.high, -gain.low) if negated else (gain.low, gain.high)
    confidence = f"{100 * gain.confidence:.0f} %"
    low, high = [points(end) if gain.conclusion == "not distinguishable" else f"{100 * end:.1f}" for end in ends]
    return f"{confidence} interval {low} to {high}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _cost(result: MethodResult) -> str:
    costs = [f"{result.trainable:,} trainable parameters"] if result.trainable is not None else []
    costs += [f"{result.seconds:.1f} s"] if result.seconds is not None else []
    return " and ".join(costs) or "unknown cost"
