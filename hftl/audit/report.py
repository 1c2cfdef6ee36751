"""The findings as one page: an overview, then a section for each finding with its rows shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hftl.audit.class_balance import Labels
from hftl.audit.finding import FINDINGS, Address, Entry, Finding, Numbering, format_counts
from hftl.audit.image_stats import pictures_at
from hftl.data.splits import Splits
from hftl.html.blocks import Card, ExampleGroup, ExampleGroups, Note, Section, Table, Tiles
from hftl.html.page import write_page
from hftl.reporting.examples import shortened, thumbnail

SHOWN = 24
"""Entries of a finding that are shown with their content."""
LISTED = 500
"""Entries that are listed; check.json has all."""


@dataclass(frozen=True)
class Shown:
    """The rows that a page shows."""

    splits: Splits
    columns: Sequence[str]
    """The columns of inputs."""
    images: bool
    labels: Labels
    numbering: Numbering

    def where(self, place: Address) -> str:
        """Returns split, row and label."""
        code = self.labels.codes[self.numbering.of_split(place[0]).start + place[1]]
        return f"{place[0]} row {place[1]}" + (f", {self.labels.names[code]}" if code >= 0 else "")


def write_findings(output: Path, shown: Shown, findings: Sequence[Finding], model: str | None) -> Path:
    """Writes the page and returns where.

    Args:
        output: The HTML file.
        shown: The rows.
        findings: In the order of the page.
        model: The model that was asked, if any.
    """
    about = [shown.splits.config.source, f"features of {model}" if model else "without a model"]
    sections = [_overview(shown.splits, findings)]
    sections += [_section(finding, shown) for finding in findings if finding.found]
    return write_page(output, "Data check", about, sections)


def _overview(splits: Splits, findings: Sequence[Finding]) -> Section:
    tiles = [(split, len(rows), "rows") for split, rows in splits.items()]
    in_order = sorted(findings, key=lambda each: (not each.found, not each.looked))
    rows = [(FINDINGS[each.name], each.name, each.said) for each in in_order]
    unseen = [each for each in findings if not each.looked]
    left = [
        Note(f"{', '.join(FINDINGS[each.name] for each in unseen if each.sentence == sentence)}: {sentence}")
        for sentence in dict.fromkeys(each.sentence for each in unseen)
    ]
    return Section("Overview", [Tiles(tiles), Table("What was found", ["Finding", "Name", "Found"], rows), *left])


def _section(finding: Finding, rows: Shown) -> Section:
    blocks: list[object] = [Note(finding.sentence)]
    blocks += [Note(problem, warning=True) for problem in finding.problems]
    if finding.entries:
        shown = finding.entries[:SHOWN]
        addresses = list(dict.fromkeys(place for entry in shown for place in _places(entry)))
        cards = _cards(rows, addresses)
        blocks.append(
            ExampleGroups([ExampleGroup([cards[place] for place in _places(entry)], entry.why) for entry in shown])
        )
        listed = finding.entries[:LISTED]
        more = f"; the first {LISTED} of {len(finding.entries):,}, all are in check.json" * (
            len(finding.entries) > LISTED
        )
        lines = [(rows.where((entry.split, entry.row)), entry.why) for entry in listed]
        blocks.append(Table(f"{format_counts(finding.counts)}{more}", ["Row", "Why"], lines))
    return Section(FINDINGS[finding.name], blocks)


def _places(entry: Entry) -> list[Address]:
    return [(entry.split, entry.row), *([entry.other] if entry.other else [])]


def _cards(shown: Shown, places: Sequence[Address]) -> dict[Address, Card]:
    cards = {}
    for split, rows in shown.splits.items():
        here = [place for place in places if place[0] == split]
        numbers = [row for _, row in here]
        if not numbers:
            continue
        if shown.images:
            limit = shown.splits.config.max_pixels
            for place, image in zip(here, pictures_at(rows, shown.columns[0], numbers), strict=True):
                cards[place] = Card(shown.where(place), thumbnail(image, limit))
        else:
            table = rows.select_columns(list(shown.columns))[numbers]
            for number, place in enumerate(here):
                texts = [(name, shortened(table[name][number])) for name in shown.columns]
                cards[place] = Card(shown.where(place), None, texts)
    return cards
