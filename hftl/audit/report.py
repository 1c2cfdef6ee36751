"""HTML page of a data check: an overview, and a section with example rows per finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hftl.audit.class_balance import Labels
from hftl.audit.finding import FINDINGS, Address, Entry, Finding, Numbering, format_counts, unchecked_by_reason
from hftl.audit.image_stats import stored_images
from hftl.data.splits import Splits
from hftl.html.blocks import Card, ExampleGroup, ExampleGroups, Note, Section, Table, Tiles
from hftl.html.page import write_page
from hftl.reporting.examples import shortened, thumbnail

SHOWN = 24
"""Maximum entries of a finding that are rendered with their content."""
LISTED = 500
"""Maximum entries of a finding that are listed; check.json contains all."""


@dataclass(frozen=True)
class PageRows:
    """Rows that the page renders."""

    splits: Splits
    columns: Sequence[str]
    """Input columns."""
    images: bool
    """Whether the inputs are images."""
    labels: Labels
    numbering: Numbering

    def caption(self, address: Address) -> str:
        """Returns split, row number and label of a row."""
        split, row = address
        code = self.labels.codes[self.numbering.of_split(split).start + row]
        return f"{split} row {row}" + (f", {self.labels.names[code]}" if code >= 0 else "")


def write_findings(output: Path, page_rows: PageRows, findings: Sequence[Finding], model: str | None) -> Path:
    """Writes the HTML page and returns its path.

    Args:
        output: HTML file.
        page_rows: Rows of all splits.
        findings: Findings in the order of the page.
        model: Model of the model checks; None without them.
    """
    about = [page_rows.splits.config.source, f"features of {model}" if model else "without a model"]
    sections = [_overview(page_rows.splits, findings)]
    sections += [_section(finding, page_rows) for finding in findings if finding.found]
    return write_page(output, "Data check", about, sections)


def _overview(splits: Splits, findings: Sequence[Finding]) -> Section:
    tiles = [(split, len(rows), "rows") for split, rows in splits.items()]
    ordered = sorted(findings, key=lambda finding: (not finding.found, not finding.checked))
    rows = [(FINDINGS[finding.name], finding.name, finding.count_text) for finding in ordered]
    notes = [
        Note(f"{', '.join(FINDINGS[name] for name in names)}: {reason}")
        for names, reason in unchecked_by_reason(findings).items()
    ]
    return Section("Overview", [Tiles(tiles), Table("Findings", ["Finding", "Name", "Rows"], rows), *notes])


def _section(finding: Finding, page_rows: PageRows) -> Section:
    blocks: list[object] = [Note(finding.description)]
    blocks += [Note(problem, warning=True) for problem in finding.problems]
    if finding.entries:
        examples = finding.entries[:SHOWN]
        cards = _cards(page_rows, list(dict.fromkeys(address for entry in examples for address in _addresses(entry))))
        groups = [ExampleGroup([cards[address] for address in _addresses(entry)], entry.why) for entry in examples]
        blocks.append(ExampleGroups(groups))
        listed = finding.entries[:LISTED]
        is_truncated = len(finding.entries) > LISTED
        truncation = f"; first {LISTED} of {len(finding.entries):,}, all in check.json" if is_truncated else ""
        lines = [(page_rows.caption((entry.split, entry.row)), entry.why) for entry in listed]
        blocks.append(Table(f"{format_counts(finding.counts)}{truncation}", ["Row", "Reason"], lines))
    return Section(FINDINGS[finding.name], blocks)


def _addresses(entry: Entry) -> list[Address]:
    return [(entry.split, entry.row), *([entry.other] if entry.other else [])]


def _cards(page_rows: PageRows, addresses: Sequence[Address]) -> dict[Address, Card]:
    cards = {}
    for split, rows in page_rows.splits.items():
        in_split = [address for address in addresses if address[0] == split]
        numbers = [row for _, row in in_split]
        if not numbers:
            continue
        if page_rows.images:
            limit = page_rows.splits.config.max_pixels
            for address, image in zip(in_split, stored_images(rows, page_rows.columns[0], numbers), strict=True):
                cards[address] = Card(page_rows.caption(address), thumbnail(image, limit))
        else:
            table = rows.select_columns(list(page_rows.columns))[numbers]
            for index, address in enumerate(in_split):
                texts = [(name, shortened(table[name][index])) for name in page_rows.columns]
                cards[address] = Card(page_rows.caption(address), None, texts)
    return cards
