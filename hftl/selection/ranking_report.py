"""A ranking as one HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hftl.features.labeled_features import LabelKind
from hftl.features.transferability import TRANSFERABILITY_SCORES
from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Quantity, Section, Table, Tiles
from hftl.html.page import write_page
from hftl.selection.bootstrap_ranks import Score
from hftl.selection.candidate import Candidate

MEASURES: dict[LabelKind, str] = {"classes": "accuracy", "labels": "mean AUC", "values": "R²"}
"""What the linear probe and k-NN measure, for each kind of labels."""


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first, and what was said of them.

    Attributes:
        source: Of the rows.
        task: Its name.
        kind: What the labels are.
        rows: Number of training rows that were used.
        by: Estimator that orders the candidates.
        place: Where the features that it orders by are read: `head`, or `layer mean`.
        candidates: Those that could be scored, in order, then the others.
        scores: Place of the features (`head`; for text `layer mean`) -> estimator -> candidate -> score.
        by_size: Names by number of parameters, the order that does not look at the data.
    """

    source: str
    task: str
    kind: LabelKind
    rows: int
    by: str
    place: str
    candidates: list[Candidate]
    scores: dict[str, dict[str, dict[str, Score]]]
    by_size: list[str]

    @property
    def order(self) -> list[str]:
        """Returns the names of the candidates that were scored, best first."""
        return [candidate.name for candidate in self.candidates if not candidate.problem]

    @property
    def leading(self) -> dict[str, Score]:
        """Returns the scores that order the candidates, by name."""
        return self.scores[self.place].get(self.by, {})

    @property
    def undecided(self) -> list[str]:
        """Returns the other candidates that may as well be the first: their 95 % of ranks include it."""
        return [name for name in self.order[1:] if name in self.leading and self.leading[name].ranks[0] == 1]

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        names = ("source", "task", "kind", "rows", "by", "place", "order", "undecided")
        about = {name: getattr(self, name) for name in names}
        candidates = []
        for candidate in self.candidates:
            entry = {
                name: getattr(candidate, name)
                for name in ("name", "problem", "parameters", "input_size", "source_classes")
            }
            entry["features"] = {
                place: {
                    "size": view.feature_size,
                    "forward_seconds": round(view.forward_seconds, 3),
                    "score_seconds": round(view.score_seconds, 3),
                    "scores": {
                        estimator: asdict(found[candidate.name])
                        for estimator, found in self.scores[place].items()
                        if candidate.name in found
                    },
                }
                for place, view in candidate.views.items()
            }
            candidates.append(entry)
        cited = {
            name: {"assumes": each.assumes, "citation": each.citation}
            for name, each in TRANSFERABILITY_SCORES.items()
            if self.kind in each.kinds
        }
        return about | {"baseline": {"by_size": self.by_size}, "candidates": candidates, "estimators": cited}


def write_ranking_page(ranking: Ranking, output: Path) -> Path:
    """Writes the page, and returns where.

    Raises:
        ConfigError: `output` cannot be written.
    """
    made = [_first(ranking), _picture(ranking), _scores(ranking), _baseline(ranking), _assumptions(ranking)]
    about = [ranking.task.replace("_", " "), ranking.source, f"{ranking.rows:,} training rows", _by(ranking)]
    return write_page(output, "Which backbone?", about, made)


def _names(ranking: Ranking) -> dict[str, str]:
    return short_names([candidate.name for candidate in ranking.candidates])


def _by(ranking: Ranking) -> str:
    return f"by {ranking.by}" + ("" if ranking.place == "head" else f" of the {ranking.place}")


def _first(ranking: Ranking) -> Section:
    """The winner, who else it may be, and all candidates with their cost."""
    names, leading = _names(ranking), ranking.leading
    rows: list[list[Cell]] = []
    for candidate in ranking.candidates:
        if candidate.problem:
            continue
        score, view = leading.get(candidate.name), candidate.head
        seconds = sum(each.score_seconds for each in candidate.views.values())
        cells: list[Cell] = [names[candidate.name], Quantity(rank_text(score) if score else "–")]
        cells.append(Measured(score.value, score.interval) if score else None)
        cells.append(Quantity(f"{score.first:.0%}") if score else None)
        cells += [candidate.parameters, view.feature_size, Quantity(candidate.input_size or "–")]
        rows.append([*cells, Quantity(f"{view.forward_seconds:.1f} s"), Quantity(f"{seconds:.1f} s")])
    head = ["candidate", "rank", ranking.by, "first", "parameters", "features", "input", "forward", "scores"]
    blocks: list[Any] = []
    if leading:
        best = leading[ranking.order[0]]
        tile = (names[ranking.order[0]], Measured(best.value, best.interval), "")
        blocks.append(Tiles([tile]))
    blocks.append(Table(f"Candidates {_by(ranking)}", head, rows))
    if ranking.undecided:
        others = ", ".join(names[name] for name in ranking.undecided)
        blocks.append(Note(f"Not distinguishable from the first on these rows: {others}.", warning=True))
    left_out = [f"{names[each.name]}: {each.problem}" for each in ranking.candidates if each.problem]
    blocks += [Note(f"Left out: {text}", warning=True) for text in left_out]
    blocks.append(
        Note(
            f"Linear probe and k-NN: leave-one-out {MEASURES[ranking.kind]}. In brackets: 95 % over resampled rows, "
            "the same draws for all candidates; first: share of the draws in which no other was better. These are "
            "scores of frozen features: fine-tuning may order the candidates otherwise."
        )
    )
    return Section("Ranking", blocks)


def _picture(ranking: Ranking) -> Section:
    """Score over the cost of one row."""
    names, leading = _names(ranking), ranking.leading
    found = {}
    for candidate in ranking.candidates:
        score = leading.get(candidate.name)
        if score:
            milliseconds = max(candidate.head.forward_seconds / ranking.rows * 1e3, 1e-3)
            found[names[candidate.name]] = (milliseconds, score.value, score.interval)
    if not found:
        return Section("Cost and quality", [Note(f"No candidate has the score {ranking.by}.")])
    said = "; ".join(f"{name}: {score:.3f} at {cost:.2g} ms" for name, (cost, score, _) in found.items())
    x = "forward pass, ms a row"
    svg = figures.cost_and_score(found, f"{ranking.by} by forward time: {said}", x=x, y=ranking.by)
    caption = "Up is better, left is cheaper. Times as measured when the features were computed."
    return Section("Cost and quality", [Figures([Figure(svg, caption, wide=True)])])


def _scores(ranking: Ranking) -> Section:
    """Every estimator, for every place of the features."""
    names, blocks = _names(ranking), []
    for place, found in ranking.scores.items():
        rows: list[list[Cell]] = []
        for name in ranking.order:
            cells: list[Cell] = [names[name]]
            for of in found.values():
                cells.append(Measured(of[name].value, of[name].interval) if name in of else None)
                cells.append(of[name].rank if name in of else None)
            if any(name in of for of in found.values()):
                rows.append(cells)
        caption = "Input of the head" if place == "head" else f"{place.capitalize()}: all layers in place of the last"
        heads = [part for estimator in found for part in (estimator, "rank")]
        blocks.append(Table(caption, ["candidate", *heads], rows))
    return Section("Every score", blocks)


def _baseline(ranking: Ranking) -> Section:
    names, leading = _names(ranking), ranking.leading
    rows: list[list[Cell]] = [
        [names[name], place, leading[name].rank if name in leading else None]
        for place, name in enumerate(ranking.by_size, 1)
    ]
    text = "An order by size alone never looks at the data: a score is worth its cost where it orders better."
    table = Table("By parameters, most first", ["candidate", "place by size", f"rank by {ranking.by}"], rows)
    return Section("Baseline to beat", [table, Note(text)])


def _assumptions(ranking: Ranking) -> Section:
    rows = [
        [name, each.assumes, each.citation]
        for name, each in TRANSFERABILITY_SCORES.items()
        if any(name in found for found in ranking.scores.values())
    ]
    return Section("What each score assumes", [Table("Estimators", ["score", "assumes", "source"], rows)])


def format_ranking(ranking: Ranking) -> str:
    """Returns a line for each candidate, and for text a second table of the layer means."""
    measure, short = MEASURES[ranking.kind], short_names([candidate.name for candidate in ranking.candidates])
    parts = [f"Ranked by {ranking.by}, {ranking.rows:,} training rows; linear probe and k-NN: leave-one-out {measure}."]
    for place in sorted(ranking.scores, key=lambda place: place != ranking.place):
        found = ranking.scores[place]
        lines = [_head(ranking, found)]
        for candidate in ranking.candidates:
            if candidate.problem is None and place in candidate.views:
                lines.append(_line(ranking, candidate, place, short))
        if len(ranking.scores) > 1:
            parts.append("Features: the input of the head." if place == "head" else "Features: the mean of the layers.")
        parts.append(_aligned(lines))
    left_out = [f"– {short[each.name]}: {each.problem}" for each in ranking.candidates if each.problem]
    return "\n\n".join([*parts, *(["\n".join(left_out)] if left_out else [])])


def _head(ranking: Ranking, found: dict[str, dict[str, Score]]) -> list[str]:
    others = [name for name in found if name != ranking.by]
    leading = [ranking.by, "95 %"] if ranking.by in found else []
    return [
        "rank",
        "candidate",
        *leading,
        *others,
        "parameters",
        "features",
        "input",
        "forward s",
        "scores s",
        "by size",
    ]


def _line(ranking: Ranking, candidate: Candidate, place: str, short: dict[str, str]) -> list[str]:
    found, view = ranking.scores[place], candidate.views[place]
    score = found.get(ranking.by, {}).get(candidate.name)
    line = [rank_text(score) if score else "–", short[candidate.name]]
    if ranking.by in found:
        line += [f"{score.value:.4f}", f"[{score.interval[0]:.3f}, {score.interval[1]:.3f}]"] if score else ["–", "–"]
    for estimator, of in found.items():
        if estimator != ranking.by:
            other = of.get(candidate.name)
            line.append(f"{other.value:.4g} ({other.rank})" if other else "–")
    size = ranking.by_size.index(candidate.name) + 1
    line += [f"{candidate.parameters:,}", f"{view.feature_size:,}", candidate.input_size or "–"]
    return [*line, f"{view.forward_seconds:.1f}", f"{view.score_seconds:.1f}", str(size)]


def rank_text(score: Score) -> str:
    """Returns the rank, and where it lies in 95 % of the resamples where that is not one rank."""
    low, high = score.ranks
    return f"{score.rank}" if low == high == score.rank else f"{score.rank} ({low}-{high})"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns folders by their last part where that is unambiguous, other names as they are."""
    short = {name: Path(name.removeprefix("local-dir:")).name if _is_folder(name) else name for name in names}
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def _is_folder(name: str) -> bool:
    return name.startswith("local-dir:") or Path(name).is_dir()


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = {0, 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def explanation(ranking: Ranking) -> str:
    """Returns what each estimator in the table assumes, and its source."""
    shown = [name for name in TRANSFERABILITY_SCORES if any(name in found for found in ranking.scores.values())]
    return "\n".join(
        textwrap.fill(
            f"{name}: {TRANSFERABILITY_SCORES[name].assumes} [{TRANSFERABILITY_SCORES[name].citation}]",
            100,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name in shown
    )
