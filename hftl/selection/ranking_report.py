"""A ranking as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hftl.features.transferability import ESTIMATORS
from hftl.html import figures
from hftl.html.blocks import Cell, Figure, Figures, Measured, Note, Quantity, Section, Table, Tiles
from hftl.html.page import write_page
from hftl.selection.ranking import MEASURES, Ranking
from hftl.selection.ranking_table import rank_text, short_names


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
        for name, each in ESTIMATORS.items()
        if any(name in found for found in ranking.scores.values())
    ]
    return Section("What each score assumes", [Table("Estimators", ["score", "assumes", "source"], rows)])
