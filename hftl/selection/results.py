"""From the run folders of a comparison to its verdict. Nothing is trained here; folders of last year do as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hftl.errors import ArtifactError, HftlError, first_line
from hftl.reporting.run_record import RunRecord
from hftl.selection.experiment_plan import METHODS, SCRATCH
from hftl.statistics.score_difference import Difference, difference, required_samples, roughly


@dataclass(frozen=True)
class Failure:
    """A training without a result."""

    seed: int
    reason: str


@dataclass(frozen=True)
class MethodResult:
    """One way of training: its runs, what they cost, and how it does against the baseline."""

    method: str
    runs: list[str]
    """Run folders, by name."""
    seeds: list[int]
    scores: list[float]
    """Mean score over the rows, of each run."""
    validation: float | None
    """Mean over the runs of what the best method is chosen by."""
    validation_loss: float | None
    seconds: float | None
    """Mean over the runs of the time of training, evaluations included."""
    peak_bytes: int | None
    """Most memory that one of the runs held: on the device where there is one, else resident in its process."""
    trainable: int | None
    """Parameters that learn."""
    difference: Difference | None = None
    """Against the baseline."""
    failures: list[Failure] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Mean over the runs; NaN without any."""
        return float(np.mean(self.scores)) if self.scores else float("nan")


@dataclass(frozen=True)
class CostSaving:
    """What the dearest way of transfer gains over the simplest one."""

    simplest: str
    most_expensive: str
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """Ways of training, side by side on the same rows."""

    data: str
    model: str
    split: str
    rows: int
    metric: str
    budget: str
    results: list[MethodResult]
    baseline: str | None
    """The method that the others are compared with: scratch where it was asked for, else the simplest."""
    chosen: str | None
    """The best of the other methods on validation; the verdict is about this one."""
    kept: str | None
    """The run that is best on validation, of all."""
    cost_saving: CostSaving | None = None
    conclusion: str | None = None
    """helped, hurt, better, worse or not distinguishable; None where a side is missing."""
    sentence: str = ""
    warnings: list[str] = field(default_factory=list)

    def result(self, method: str | None) -> MethodResult:
        """Returns the result of a method.

        Raises:
            KeyError: It was not compared.
        """
        found = {result.method: result for result in self.results}
        return found[method or ""]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return _finite(asdict(self))


def judge(
    folders: Mapping[str, Mapping[int, Path]], split: str, budget: str, failures: Mapping[str, Sequence[Failure]]
) -> Comparison:
    """Returns what run folders say about the methods that made them, verdict and all.

    Args:
        folders: Run folders by method and seed.
        split: The split that is compared.
        budget: What was the same for all, in words.
        failures: Trainings without a folder, by method.

    Raises:
        ArtifactError: No run has results on that split.
    """
    records: dict[str, dict[int, RunRecord]] = {method: {} for method in folders}
    failed = {method: list(failures.get(method, ())) for method in folders}
    rows: tuple[str, int] | None = None
    for method, of_method in folders.items():
        for seed, folder in of_method.items():
            try:
                record = RunRecord(folder)
                found = _rows(record, split)
                if rows is not None and found != rows:
                    raise ArtifactError(f"'{folder}' was not measured on the same rows of {split} as the others.")
            except HftlError as error:
                failed[method].append(Failure(seed, first_line(error)))
                continue
            rows = found
            records[method][seed] = record
    if rows is None:
        reasons = "; ".join(f"{method}, seed {f.seed}: {f.reason}" for method, of in failed.items() for f in of)
        raise ArtifactError(f"no training of the comparison has a result: {reasons}")
    baseline = next((method for method in (SCRATCH, *METHODS) if records.get(method)), None)
    results = [
        _result(method, of_method, split, records[baseline] if baseline not in (None, method) else {}, failed[method])
        for method, of_method in records.items()
    ]
    some = next(record for of_method in records.values() for record in of_method.values())
    others = [result for result in results if result.scores and result.method != baseline]
    chosen = max(others, key=_on_validation).method if others else None
    everything = [record for of_method in records.values() for record in of_method.values()]
    kept = max(everything, key=lambda record: _validation(record)).folder.name
    return conclude(
        Comparison(
            data=str(some.settings.get("data.source")),
            model=str(some.settings.get("model.name")),
            split=split,
            rows=rows[1],
            metric=some.answers[split].metric,
            budget=budget,
            results=results,
            baseline=baseline,
            chosen=chosen,
            kept=kept,
            cost_saving=_spared(records, results, split),
        )
    )


def row_scores(record: RunRecord, split: str) -> Any:
    """Returns the score of each row of a split [N] float64, larger is better: see `hftl.tasks.predictions`.

    Raises:
        ArtifactError: The run has no predictions of that split that can be compared with the truth.
    """
    answers = record.answers.get(split)
    if answers is None:
        raise ArtifactError(f"'{record.folder}' has no predictions of {split} beside true labels.")
    return answers.scores


def _rows(record: RunRecord, split: str) -> tuple[str, int]:
    scores = row_scores(record, split)
    return record.answers[split].fingerprint, len(scores)


def _result(
    method: str,
    records: Mapping[int, RunRecord],
    split: str,
    baseline: Mapping[int, RunRecord],
    failures: list[Failure],
) -> MethodResult:
    found = list(records.values())
    training = [record.facts.get("training", {}) for record in found]
    seconds = [made["seconds"] for made in training if "seconds" in made]
    peaks = [made.get("peak_device_bytes") or made.get("peak_resident_bytes") for made in training]
    on_validation = [_validation(record) for record in found]
    return MethodResult(
        method,
        [record.folder.name for record in found],
        list(records),
        [float(row_scores(record, split).mean()) for record in found],
        float(np.mean([score for score, _ in on_validation])) if found else None,
        float(np.mean([-loss for _, loss in on_validation])) if found else None,
        float(np.mean(seconds)) if seconds else None,
        max((peak for peak in peaks if peak), default=None),
        found[0].facts.get("adapt", {}).get("trainable") if found else None,
        _apart(records, baseline, split),
        failures,
    )


def _apart(one: Mapping[int, RunRecord], other: Mapping[int, RunRecord], split: str) -> Difference | None:
    """Returns the difference between two methods; None where one has no result."""
    if not one or not other:
        return None
    return difference(*([row_scores(record, split) for record in records.values()] for records in (one, other)))


def _spared(
    records: Mapping[str, Mapping[int, RunRecord]], results: Sequence[MethodResult], split: str
) -> CostSaving | None:
    pretrained = [result for result in results if result.method != SCRATCH and result.scores]
    if len(pretrained) < 2:
        return None
    simplest, *_, most_expensive = sorted(pretrained, key=lambda result: METHODS.index(result.method))
    found = _apart(records[most_expensive.method], records[simplest.method], split)
    return CostSaving(simplest.method, most_expensive.method, found) if found else None


def _validation(record: RunRecord) -> tuple[float, float]:
    """Returns what a run is chosen by, larger is better: the compared metric on validation, then the loss there."""
    answers = next(iter(record.answers.values()), None)  # of any split: all are measured by the same metric
    score, loss = (record.metrics.get(f"validation/{name}") for name in (answers.metric if answers else "", "loss"))
    return (-np.inf if score is None else score), (-np.inf if loss is None else -loss)


def _on_validation(result: MethodResult) -> tuple[float, float, int]:
    """As `_validation`, of a method; of equal ones the simplest."""
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
"""With fewer rows than this, only large differences can be told from none; it is said."""


def conclude(found: Comparison) -> Comparison:
    """Returns `found` with its verdict, the sentence for it, and what a reader should know beside them."""
    conclusion, sentence = _verdict(found)
    return replace(found, conclusion=conclusion, sentence=sentence, warnings=_warnings(found))


def _verdict(found: Comparison) -> tuple[str | None, str]:
    if found.chosen is None or found.baseline is None:
        ended = next(result.method for result in found.results if result.scores)
        return None, f"No verdict: of all methods only {ended} has a result."
    chosen, baseline = found.result(found.chosen), found.result(found.baseline)
    apart = chosen.difference
    assert apart is not None, "both have results"
    among = [result.method for result in found.results if result.scores and result.method != baseline.method]
    best = f" (of {', '.join(among)} the best on validation)" if len(among) > 1 else ""
    about = (
        f"{chosen.method}{best} {_percent(chosen.score)}, {baseline.method} {_percent(baseline.score)}; "
        f"{found.rows:,} rows, {_seeds(apart.seeds)}"
    )
    size = f"{abs(100 * apart.value):.1f} points of {found.split} {found.metric}"
    transfer = baseline.method == SCRATCH
    if apart.conclusion == "not distinguishable":
        return apart.conclusion, (
            f"Not distinguishable on this {found.split} size: {chosen.method} minus {baseline.method} is "
            f"{points(apart.value)} points of {found.metric} ({interval(apart)}). {_needed(apart)} [{about}]"
        )
    if transfer:
        helped = "helped" if apart.conclusion == "better" else "hurt"
        return helped, f"Transfer {helped} by {size} ({interval(apart, apart.value < 0)}): {about}."
    return apart.conclusion, (
        f"{chosen.method} is {apart.conclusion} than {baseline.method} by {size} "
        f"({interval(apart, apart.value < 0)}): {about}. Whether transfer helped is not known without scratch."
    )


def _needed(apart: Difference) -> str:
    if not apart.value:
        return "No difference was seen at all."
    found = required_samples(apart)
    ways = []
    if found.rows is not None:
        ways.append(f"about {roughly(found.rows):,} rows")
    if found.seeds is not None:
        ways.append(f"about {found.seeds} seeds")
    if not ways:
        both = "rows" if apart.seeds == 1 else "rows and more seeds"
        return f"Many more {both} would be needed to tell a difference of this size from none."
    needs = " or ".join(ways)
    return f"{needs[0].upper()}{needs[1:]} would be needed to tell a difference of this size from none."


def _warnings(found: Comparison) -> list[str]:
    out = []
    if found.split != "test":
        out.append(
            f"There is no test split. {found.split.capitalize()} chose the weights of each run and the best method "
            "too, so these figures are optimistic."
        )
    if found.rows < FEW_ROWS:
        out.append(f"{found.rows} rows are few: only large differences can be told from none.")
    if any(result.difference and result.difference.seeds == 1 for result in found.results):
        out.append("One seed: the intervals cover the rows alone, not what another seed would change.")
    if any(result.difference and result.difference.seeds == 2 for result in found.results):
        out.append("Two seeds hardly say how much seeds change; intervals are wide for that reason. Three are better.")
    if found.baseline != SCRATCH and any(result.method == SCRATCH for result in found.results):
        out.append(f"Training from scratch has no result; the others are compared with {found.baseline} instead.")
    for result in found.results:
        out += [f"{result.method}, seed {f.seed}, failed: {f.reason}" for f in result.failures]
    if found.cost_saving and found.cost_saving.difference.conclusion == "not distinguishable":
        simple, dear = found.result(found.cost_saving.simplest), found.result(found.cost_saving.most_expensive)
        apart = found.cost_saving.difference
        out.append(
            f"The simplest method is within the noise of the dearest: {dear.method} minus {simple.method} is "
            f"{points(apart.value)} points ({interval(apart)}), at {_cost(dear)} a run against {_cost(simple)}."
        )
    return out


def format_comparison(found: Comparison) -> str:
    """Returns the methods line by line: quality, difference from the baseline, cost."""
    against = f"against {found.baseline}, 95 % interval"
    head = ["method", f"{found.split} {found.metric}", against, "trained parameters", "seconds a run", "peak memory"]
    lines = [head]
    for result in found.results:
        if not result.scores:
            lines.append([result.method, "failed", "", "", "", ""])
            continue
        apart = result.difference
        lines.append(
            [
                result.method,
                format_score(result),
                f"{points(apart.value)} points [{points(apart.low)}, {points(apart.high)}]" if apart else "",
                f"{result.trainable:,}" if result.trainable is not None else "",
                f"{result.seconds:.1f}" if result.seconds is not None else "",
                f"{result.peak_bytes / 2**20:,.0f} MiB" if result.peak_bytes else "",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = [
        "   ".join(cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    seeds = max(len(result.scores) for result in found.results)
    return "\n".join(line.rstrip() for line in shown) + f"\n({footnote(found, seeds)})"


def footnote(found: Comparison, seeds: int) -> str:
    """Returns what the numbers of the table are."""
    mean = f"Mean ± standard deviation over {_seeds(seeds)}; " if seeds > 1 else ""
    return (
        f"{mean}{found.rows:,} rows; {found.budget}.\nDifferences: on the same rows; intervals over rows and seeds, "
        "each for one comparison alone.\nSeconds: mean over seeds, features included, whether computed or reused"
    )


def format_score(result: MethodResult) -> str:
    """Returns `mean ± standard deviation` over seeds, in percent; the standard deviation where there are several."""
    deviation = f" ± {100 * float(np.std(result.scores, ddof=1)):.1f}" if len(result.scores) > 1 else ""
    return f"{100 * result.score:.1f}{deviation} %"


def points(value: float) -> str:
    """Returns a difference of shares in points, with its sign."""
    return f"{100 * value:+.1f}"


def interval(apart: Difference, turned: bool = False) -> str:
    """Returns the ends of an interval in words; `turned` gives those of the opposite difference."""
    ends = (-apart.high, -apart.low) if turned else (apart.low, apart.high)
    confidence = f"{100 * apart.confidence:.0f} %"
    shown = [points(end) if apart.conclusion == "not distinguishable" else f"{100 * end:.1f}" for end in ends]
    return f"{confidence} interval {shown[0]} to {shown[1]}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _cost(result: MethodResult) -> str:
    parts = [f"{result.trainable:,} trained parameters"] if result.trainable is not None else []
    parts += [f"{result.seconds:.1f} s"] if result.seconds is not None else []
    return " and ".join(parts) or "an unknown cost"
