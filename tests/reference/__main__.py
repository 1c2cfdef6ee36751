"""Command line of the reference."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .comparison import differences, digest_inputs, only_in_one, readable, summarize, write_expected
from .renames import Renames
from .trees import ROOT, checkout, finish, start


def main() -> int:
    """Returns the exit status: 1 where two trees differ."""
    parser = argparse.ArgumentParser("python -m tests.reference", description="Compare two trees run by run.")
    parser.add_argument("--against", metavar="COMMIT", help="compare the working tree with a commit, exactly")
    parser.add_argument("--write", action="store_true", help="write expected.json from the working tree")
    parser.add_argument("--only", metavar="CELL", nargs="+", help="cells to compare; all by default")
    options = parser.parse_args()
    if not options.against and not options.write or options.write and options.only:
        parser.error("set --against COMMIT, --write or both; --write takes all cells")
    with tempfile.TemporaryDirectory(prefix="hftl_reference_") as name:
        folder = Path(name)
        if not options.against:
            result = readable(finish(start(ROOT, folder / "new"), folder / "new"), Renames.read())
            lines = []
        else:
            result, lines = compare(options.against, folder, options.only)
        if options.write:
            write_expected(summarize(result, digest_inputs(folder / "new" / "material")))
    return int(bool(lines))


def compare(commit: str, folder: Path, only: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """Runs a commit and the working tree side by side, prints and returns every difference."""
    started = time.monotonic()
    with checkout(commit, folder / "tree") as tree:
        trees = {"old": tree, "new": ROOT}
        running = {side: start(each, folder / side, only) for side, each in trees.items()}
        try:
            found = {side: finish(process, folder / side) for side, process in running.items()}
        finally:
            for process in running.values():
                process.kill()
    old, new = (readable(each, Renames.read()) for each in found.values())
    lines = differences(old, new)
    print("\n".join(lines))
    for name in only_in_one(old, new):
        print(f"note: setting {name} exists in one of the trees only")
    print(f"{len(new['cells'])} cells, {len(lines)} differences from {commit}, {time.monotonic() - started:.0f} s")
    return new, lines


if __name__ == "__main__":
    sys.exit(main())
