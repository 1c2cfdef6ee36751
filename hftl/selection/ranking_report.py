"""Ranking result, as table, JSON and HTML page."""

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
"""Metric of the linear probe and k-NN by label kind."""


@dataclass(frozen=True)
class Ranking:
    """Ranked candidates and their scores.

    Attributes:
        source: Source of the rows.
        task: Name of the task.
        kind: Kind of the labels.
        rows: Number of training rows used.
        by: Score that the candidates are ranked by.
        layer: Features of that score: `head` or `layer mean`.
        candidates: Scored candidates, best first, then the failed ones.
        scores: Scores by features (`head`; for text also `layer mean`), estimator and candidate.
        by_size: Candidates by number of parameters, most first; a baseline that does not use the data.
    """

    source: str
    task: str
    kind: LabelKind
    rows: int
    by: str
    layer: str
    candidates: list[Candidate]
    scores: dict[str, dict[str, dict[str, Score]]]
    by_size: list[str]

    @property
    def order(self) -> list[str]:
        """Names of the scored candidates, best first."""
        return [candidate.name for candidate in self.candidates if not candidate.problem]

    @property
    def leading(self) -> dict[str, Score]:
        """Scores that the candidates are ranked by, by candidate."""
        return self.scores[self.layer].get(self.by, {})

    @property
    def undecided(self) -> list[str]:
        """Candidates not distinguishable from the first: their 95 % interval of ranks includes 1."""
        return [name for name in self.order[1:] if name in self.leading and self.leading[name].ranks[0] == 1]

    def as_json(self) -> dict[str, Any]:
        """Returns the ranking as JSON values."""
        about = {name: getattr(self, name) for name in ("source", "task", "kind", "rows", "by")}
        about |= {"place": self.layer, "order": self.order, "undecided": self.undecided}
        candidates = []
        for candidate in self.candidates:
            entry = {
                name: getattr(candidate, name)
                for name in ("name", "problem", "parameters", "input_size", "source_classes")
            }
            entry["features"] = {
                layer: {
                    "size": view.feature_size,
                    "forward_seconds": round(view.forward_seconds, 3),
                    "score_seconds": round(view.score_seconds, 3),
                    "scores": {
                        estimator: asdict(by_candidate[candidate.name])
                        for estimator, by_candidate in self.scores[layer].items()
                        if candidate.name in by_candidate
                    },
                }
                for layer, view in candidate.views.items()
            }
            candidates.append(entry)
        estimators = {
            name: {"assumes": score.assumes, "citation": score.citation}
            for name, score in TRANSFERABILITY_SCORES.items()
            if self.kind in score.kinds
        }
        return about | {"baseline": {"by_size": self.by_size}, "candidates": candidates, "estimators": estimators}


def write_ranking_page(ranking: Ranking, output: Path) -> Path:
    """Writes the HTML page and returns its path.

    Raises:
        ConfigError: `output` cannot be written.
    """
    sections = [
        _ranking_section(ranking),
        _cost_section(ranking),
        _scores_section(ranking),
        _baseline_section(ranking),
        _assumptions_section(ranking),
    ]
    about = [ranking.task.replace("_", " "), ranking.source, f"{ranking.rows:,} training rows", _by(ranking)]
    return write_page(output, "Backbone ranking", about, sections)


def _names(ranking: Ranking) -> dict[str, str]:
    return short_names([candidate.name for candidate in ranking.candidates])


def _by(ranking: Ranking) -> str:
    return f"by {ranking.by}" + ("" if ranking.layer == "head" else f" of the {ranking.layer}")


def _ranking_section(ranking: Ranking) -> Section:
    """Returns the best candidate, those not distinguishable from it, and all candidates with their cost."""
    names, leading = _names(ranking), ranking.leading
    rows: list[list[Cell]] = []
    for candidate in ranking.candidates:
        if candidate.problem:
            continue
        score, view = leading.get(candidate.name), candidate.head
        score_seconds = sum(each.score_seconds for each in candidate.views.values())
        cells: list[Cell] = [names[candidate.name], Quantity(rank_text(score) if score else "–")]
        cells.append(Measured(score.value, score.interval) if score else None)
        cells.append(Quantity(f"{score.first:.0%}") if score else None)
        cells += [candidate.parameters, view.feature_size, Quantity(candidate.input_size or "–")]
        rows.append([*cells, Quantity(f"{view.forward_seconds:.1f} s"), Quantity(f"{score_seconds:.1f} s")])
    header = ["candidate", "rank", ranking.by, "first", "parameters", "features", "input", "forward", "scores"]
    blocks: list[Any] = []
    if leading:
        best = leading[ranking.order[0]]
        tile = (names[ranking.order[0]], Measured(best.value, best.interval), "")
        blocks.append(Tiles([tile]))
    blocks.append(Table(f"Candidates {_by(ranking)}", header, rows))
    if ranking.undecided:
        undecided = ", ".join(names[name] for name in ranking.undecided)
        blocks.append(Note(f"Not distinguishable from the first on these rows: {undecided}.", warning=True))
    failed = [f"{names[each.name]}: {each.problem}" for each in ranking.candidates if each.problem]
    blocks += [Note(f"Skipped: {text}", warning=True) for text in failed]
    blocks.append(
        Note(
            f"Linear probe and k-NN: leave-one-out {MEASURES[ranking.kind]}. In brackets: 95 % bootstrap intervals, "
            "with the same resampled rows for all candidates; first: fraction of resamples with rank 1. These are "
            "scores of frozen features. Fine-tuning may change the order."
        )
    )
    return Section("Ranking", blocks)


def _cost_section(ranking: Ranking) -> Section:
    """Returns a plot of the score over the forward time per row."""
    names, leading = _names(ranking), ranking.leading
    points = {}
    for candidate in ranking.candidates:
        score = leading.get(candidate.name)
        if score:
            milliseconds = max(candidate.head.forward_seconds / ranking.rows * 1e3, 1e-3)
            points[names[candidate.name]] = (milliseconds, score.value, score.interval)
    if not points:
        return Section("Score and cost", [Note(f"No candidate has the score '{ranking.by}'.")])
    listed = "; ".join(f"{name}: {score:.3f} at {cost:.2g} ms" for name, (cost, score, _) in points.items())
    x = "forward pass, ms per row"
    svg = figures.cost_and_score(points, f"{ranking.by} by forward time: {listed}", x=x, y=ranking.by)
    caption = "Higher is better, left is faster. Times as measured when the features were computed."
    return Section("Score and cost", [Figures([Figure(svg, caption, wide=True)])])


def _scores_section(ranking: Ranking) -> Section:
    """Returns a table of all scores for each kind of features."""
    names, blocks = _names(ranking), []
    for layer, scores in ranking.scores.items():
        rows: list[list[Cell]] = []
        for name in ranking.order:
            cells: list[Cell] = [names[name]]
            for by_candidate in scores.values():
                score = by_candidate.get(name)
                cells += [Measured(score.value, score.interval), score.rank] if score else [None, None]
            if any(name in by_candidate for by_candidate in scores.values()):
                rows.append(cells)
        caption = "Input of the head" if layer == "head" else f"{layer.capitalize()}: all layers instead of the last"
        header = [column for estimator in scores for column in (estimator, "rank")]
        blocks.append(Table(caption, ["candidate", *header], rows))
    return Section("All scores", blocks)


def _baseline_section(ranking: Ranking) -> Section:
    names, leading = _names(ranking), ranking.leading
    rows: list[list[Cell]] = [
        [names[name], position, leading[name].rank if name in leading else None]
        for position, name in enumerate(ranking.by_size, 1)
    ]
    text = "The order by size does not use the data. A score is useful if it orders the candidates better."
    table = Table("By parameters, most first", ["candidate", "rank by size", f"rank by {ranking.by}"], rows)
    return Section("Size baseline", [table, Note(text)])


def _assumptions_section(ranking: Ranking) -> Section:
    rows = [
        [name, score.assumes, score.citation]
        for name, score in TRANSFERABILITY_SCORES.items()
        if any(name in scores for scores in ranking.scores.values())
    ]
    return Section("Assumptions", [Table("Estimators", ["score", "assumptions", "source"], rows)])


def format_ranking(ranking: Ranking) -> str:
    """Returns the ranking as a text table; for text models a second table with the scores of the other features."""
    measure, short = MEASURES[ranking.kind], short_names([candidate.name for candidate in ranking.candidates])
    blocks = [
        f"Ranked by {ranking.by}, {ranking.rows:,} training rows; linear probe and k-NN: leave-one-out {measure}."
    ]
    for layer in sorted(ranking.scores, key=lambda layer: layer != ranking.layer):
        lines = [_header(ranking, ranking.scores[layer])]
        for candidate in ranking.candidates:
            if candidate.problem is None and layer in candidate.views:
                lines.append(_line(ranking, candidate, layer, short))
        if len(ranking.scores) > 1:
            blocks.append("Features: head input." if layer == "head" else "Features: mean of the layers.")
        blocks.append(_aligned(lines))
    failed = [f"– {short[each.name]}: {each.problem}" for each in ranking.candidates if each.problem]
    return "\n\n".join([*blocks, *(["\n".join(failed)] if failed else [])])


def _header(ranking: Ranking, scores: dict[str, dict[str, Score]]) -> list[str]:
    others = [name for name in scores if name != ranking.by]
    leading = [ranking.by, "95 %"] if ranking.by in scores else []
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


def _line(ranking: Ranking, candidate: Candidate, layer: str, short: dict[str, str]) -> list[str]:
    scores, view = ranking.scores[layer], candidate.views[layer]
    score = scores.get(ranking.by, {}).get(candidate.name)
    line = [rank_text(score) if score else "–", short[candidate.name]]
    if ranking.by in scores:
        line += [f"{score.value:.4f}", f"[{score.interval[0]:.3f}, {score.interval[1]:.3f}]"] if score else ["–", "–"]
    for estimator, by_candidate in scores.items():
        if estimator != ranking.by:
            other_score = by_candidate.get(candidate.name)
            line.append(f"{other_score.value:.4g} ({other_score.rank})" if other_score else "–")
    size = ranking.by_size.index(candidate.name) + 1
    line += [f"{candidate.parameters:,}", f"{view.feature_size:,}", candidate.input_size or "–"]
    return [*line, f"{view.forward_seconds:.1f}", f"{view.score_seconds:.1f}", str(size)]


def rank_text(score: Score) -> str:
    """Returns the rank, with its 95 % bootstrap interval if that contains other ranks."""
    low, high = score.ranks
    return f"{score.rank}" if low == high == score.rank else f"{score.rank} ({low}-{high})"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns unambiguous folders without their parent path; other names stay unchanged."""
    short = {name: Path(name.removeprefix("local-dir:")).name if _is_folder(name) else name for name in names}
    values = list(short.values())
    return {name: value if values.count(value) == 1 else name for name, value in short.items()}


def _is_folder(name: str) -> bool:
    return name.startswith("local-dir:") or Path(name).is_dir()


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left_aligned = {0, 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def explanation(ranking: Ranking) -> str:
    """Returns assumptions and source of each score in the table."""
    computed = [name for name in TRANSFERABILITY_SCORES if any(name in scores for scores in ranking.scores.values())]
    return "\n".join(
        textwrap.fill(
            f"{name}: {TRANSFERABILITY_SCORES[name].assumes} [{TRANSFERABILITY_SCORES[name].citation}]",
            100,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name in computed
    )
