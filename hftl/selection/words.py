"""What a comparison found, in sentences and as a table for the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hftl.selection.experiment_plan import SCRATCH
from hftl.statistics.score_difference import Difference, needed, roughly

if TYPE_CHECKING:
    from hftl.selection.results import Comparison, MethodResult

FEW_ROWS = 50
"""With fewer rows than this, only large differences can be told from none; it is said."""


def conclude(found: Comparison) -> Comparison:
    """Returns `found` with its verdict, the sentence for it, and what a reader should know beside them."""
    verdict, sentence = _verdict(found)
    return replace(found, verdict=verdict, sentence=sentence, warnings=_warnings(found))


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
    if apart.verdict == "not distinguishable":
        return apart.verdict, (
            f"Not distinguishable on this {found.split} size: {chosen.method} minus {baseline.method} is "
            f"{points(apart.value)} points of {found.metric} ({interval(apart)}). {_needed(apart)} [{about}]"
        )
    if transfer:
        helped = "helped" if apart.verdict == "better" else "hurt"
        return helped, f"Transfer {helped} by {size} ({interval(apart, apart.value < 0)}): {about}."
    return apart.verdict, (
        f"{chosen.method} is {apart.verdict} than {baseline.method} by {size} "
        f"({interval(apart, apart.value < 0)}): {about}. Whether transfer helped is not known without scratch."
    )


def _needed(apart: Difference) -> str:
    if not apart.value:
        return "No difference was seen at all."
    found = needed(apart)
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
    if found.spared and found.spared.difference.verdict == "not distinguishable":
        simple, dear = found.result(found.spared.simplest), found.result(found.spared.dearest)
        apart = found.spared.difference
        out.append(
            f"The simplest method is within the noise of the dearest: {dear.method} minus {simple.method} is "
            f"{points(apart.value)} points ({interval(apart)}), at {_cost(dear)} a run against {_cost(simple)}."
        )
    return out


def table(found: Comparison) -> str:
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
                spread(result),
                f"{points(apart.value)} points [{points(apart.low)}, {points(apart.high)}]" if apart else "",
                f"{result.trained:,}" if result.trained is not None else "",
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
    return "\n".join(line.rstrip() for line in shown) + f"\n({foot(found, seeds)})"


def foot(found: Comparison, seeds: int) -> str:
    """Returns what the numbers of the table are."""
    mean = f"Mean ± standard deviation over {_seeds(seeds)}; " if seeds > 1 else ""
    return (
        f"{mean}{found.rows:,} rows; {found.budget}.\nDifferences: on the same rows; intervals over rows and seeds, "
        "each for one comparison alone.\nSeconds: mean over seeds, features included, whether computed or reused"
    )


def spread(result: MethodResult) -> str:
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
    shown = [points(end) if apart.verdict == "not distinguishable" else f"{100 * end:.1f}" for end in ends]
    return f"{confidence} interval {shown[0]} to {shown[1]}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _cost(result: MethodResult) -> str:
    parts = [f"{result.trained:,} trained parameters"] if result.trained is not None else []
    parts += [f"{result.seconds:.1f} s"] if result.seconds is not None else []
    return " and ".join(parts) or "an unknown cost"
