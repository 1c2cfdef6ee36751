"""Names that changed: one table for settings, setting values, metric keys, record keys and file names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("renames.tsv")


class Renames:
    """The table `old<TAB>new`, one line per name; lines that start with # are comments.

    A line is a setting (`train.eval_every`), a setting with a value (`model.pooling=stock`), a key of history.jsonl or
    metrics.json (`lr/head`), a column of predictions.parquet, or a file name in the run folder.
    """

    def __init__(self, text: str) -> None:
        lines = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
        malformed = [line for line in lines if len(line) != 2]
        if malformed:
            raise ValueError(f"renames.tsv: lines without exactly one tab: {malformed}")
        self.new = {old: new for old, new in lines}
        self.old = {new: old for old, new in lines}
        both = sorted(set(self.new) & set(self.old))
        if both or not len(self.old) == len(self.new) == len(lines):
            raise ValueError(f"renames.tsv: repeated names, or names that are both old and new: {both}")

    @classmethod
    def read(cls) -> Renames:
        """Returns the committed table."""
        return cls(TABLE.read_text())

    def for_tree(self, flags: Mapping[str, str], known: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Returns flags in the names that a tree uses; names that the tree and the table lack stay.

        Args:
            flags: Values by setting, in new names.
            known: The settings of the tree, with the allowed values of those that have a fixed set.
        """
        out = {}
        for name, value in flags.items():
            spelled = self.old.get(name, name) if name not in known else name
            spelled = spelled if spelled in known else name
            before = self.old.get(f"{name}={value}", "").partition("=")[2]
            allowed = known.get(spelled, ())
            out[spelled] = before if before in allowed and value not in allowed else value
        return out

    def current(self, name: str) -> str:
        """Returns the new name of a setting, key or file."""
        return self.new.get(name, name)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns settings with new names and values."""
        out = {}
        for name, value in values.items():
            changed = self.new.get(f"{name}={value}")
            out[self.current(name)] = changed.partition("=")[2] if changed else value
        return out
