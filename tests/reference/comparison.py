"""Comparison of results: of two trees exactly, of a tree and the committed file to 1e-4."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .renames import Renames

EXPECTED = Path(__file__).with_name("expected.json")
TOLERANCE = 1e-4
HASHES = ("weights", "predictions")
PER_TREE = ("settings", "history", "metrics", "files", *HASHES)

_ORIGIN = r"^(?:command line|[^\s:]+\.ya?ml): "
SETTING_OF_MESSAGE = (
    (_ORIGIN + r"there is no setting '([\w.]+)'", r"\1"),
    (_ORIGIN + r"'([\w.]+)' is a group of settings", r"\1"),
    (_ORIGIN + r"([\w.]+): ", r"\1"),
    (r"^[^\s:]+\.ya?ml, line \d+: not valid YAML", "config"),
    (r"^([a-z_]+(?:\.\w+)*)(?:: | is empty)", r"\1"),
)
"""Patterns that read the setting from the message of a problem without one; the first match counts."""


def setting_of(problem: dict[str, Any], renames: Renames) -> str:
    """Returns the setting that a problem names, in its new name; the message after ? where no pattern matches."""
    if problem["setting"]:
        return renames.current(problem["setting"])
    for pattern, setting in SETTING_OF_MESSAGE:
        match = re.match(pattern, problem["message"])
        if match:
            return renames.current(match.expand(setting))
    return f"?{problem['message']}"


def readable(result: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Returns a worker's result with the settings of problems in place of their messages, without times."""
    cells = {}
    for name, cell in result["cells"].items():
        cells[name] = {key: cell[key] for key in PER_TREE if key in cell}
        cells[name] |= {"problems": sorted(setting_of(each, renames) for each in cell["problems"])}
        cells[name] |= {"error": cell["error"].strip().rpartition("\n")[2]}
    return result | {"cells": cells}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line for each value that differs between two readable results, exactly.

    Settings that only one tree has do not count; `only_in_one` lists them.
    """
    common = set(old["settings"]) & set(new["settings"])
    lines = [f"{name}: only in one of the trees" for name in sorted(set(old["cells"]) ^ set(new["cells"]))]
    for name in sorted(set(old["cells"]) & set(new["cells"])):
        before, after = (dict(each["cells"][name]) for each in (old, new))
        for cell in (before, after):
            if "settings" in cell:
                cell["settings"] = {key: value for key, value in cell["settings"].items() if key in common}
        lines += [f"{name}: {line}" for line in differing(before, after)]
    return lines


def only_in_one(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the settings that only one of two trees has."""
    return sorted(set(old["settings"]) ^ set(new["settings"]))


def differing(before: Any, after: Any, place: str = "", tolerance: float | None = None) -> Iterator[str]:
    """Yields a line for each leaf that differs; with a tolerance, numbers may differ by it (relative above 1)."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(set(before) | set(after)):
            yield from differing(before.get(key), after.get(key), f"{place} {key}".strip(), tolerance)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differing(*pair, f"{place}[{number}]", tolerance)
    elif is_close(before, after, tolerance):
        return
    elif isinstance(before, list) and isinstance(after, list):
        missing, added = ([str(e) for e in one if e not in other] for one, other in ((before, after), (after, before)))
        yield f"{place}: {len(before)} and {len(after)} entries, missing {missing}, added {added}"
    else:
        yield f"{place}: {before!r} became {after!r}"


def is_close(before: Any, after: Any, tolerance: float | None) -> bool:
    """Whether two leaves are equal, or numbers within the tolerance."""
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (before, after))
    if tolerance is None or not numbers:
        return type(before) is type(after) and (before == after or before != before and after != after)
    return abs(before - after) <= tolerance * max(1.0, abs(before))


def summarize(result: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """Returns what the committed file holds: settings once, numbers with 7 digits, one hash per kind and run."""
    runs = {name: cell for name, cell in result["cells"].items() if "metrics" in cell}
    first = next(iter(runs.values()))["settings"]
    common = {key: value for key, value in first.items() if key != "output_dir"}
    return {
        "machine": result["machine"],
        "inputs": inputs,
        "settings": common,
        "runs": {name: summarize_run(cell, common) for name, cell in runs.items()},
        "rejected": {name: cell["problems"] for name, cell in result["cells"].items() if name not in runs},
    }


def summarize_run(cell: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Returns a run without the settings that are as in `common`, and its history by key."""
    history: dict[str, list[Any]] = {}
    for record in cell["history"]:
        for key, value in record.items():
            history.setdefault(key, []).append(rounded(value))
    out = {
        "settings": {k: v for k, v in cell["settings"].items() if k not in common or common[k] != v},
        "files": cell["files"],
        "history": history,
        "metrics": {key: rounded(value) for key, value in cell["metrics"].items()},
    }
    return out | {kind: digest(cell[kind]) for kind in HASHES}


def rounded(value: Any) -> Any:
    """Returns a number with 7 significant digits."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def digest(values: dict[str, str]) -> str:
    """Returns one hash of many, without the names that they have: these may be renamed."""
    return hashlib.sha256(json.dumps(sorted(values.values())).encode()).hexdigest()[:32]


def digest_inputs(folder: Path) -> dict[str, str]:
    """Returns a hash of the files of each dataset and model."""
    out = {}
    for place in sorted([*folder.glob("models/*"), *(each for each in folder.iterdir() if each.name != "models")]):
        content = hashlib.sha256()
        for file in sorted(place.rglob("*")):
            if file.is_file():
                content.update(str(file.relative_to(place)).encode() + b"\0" + file.read_bytes())
        out[str(place.relative_to(folder))] = content.hexdigest()[:32]
    return out


def read_expected(renames: Renames) -> dict[str, Any]:
    """Returns the content of the committed file in new names."""
    expected = json.loads(EXPECTED.read_text())
    expected["settings"] = renames.settings(expected["settings"])
    for run in expected["runs"].values():
        run["settings"] = renames.settings(run["settings"])
        run["files"] = sorted(map(renames.current, run["files"]))
        for part in ("history", "metrics"):
            run[part] = {renames.current(key): value for key, value in run[part].items()}
    rejected = expected["rejected"].items()
    return expected | {"rejected": {name: sorted(map(renames.current, settings)) for name, settings in rejected}}


def unexpected(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns a line for each difference from the committed file.

    Settings that the file lacks do not count. Hashes count only on the machine and with the versions and threads of the
    file. Inputs count like hashes: libraries of other versions may write the same weights in other bytes.
    """
    same_machine = found["machine"] == expected["machine"]
    parts = ("settings", "runs", "rejected") + (("inputs",) if same_machine else ())
    found = found | {"settings": {k: v for k, v in found["settings"].items() if k in expected["settings"]}}
    sides = [{part: each[part] for part in parts} for each in (expected, found)]
    if not same_machine:
        sides = [side | {"runs": {n: portable(run) for n, run in side["runs"].items()}} for side in sides]
    return list(differing(*sides, tolerance=TOLERANCE))


def portable(run: dict[str, Any]) -> dict[str, Any]:
    """Returns a run without what other processors change by more than 1e-4: hashes and gradient norms (detection)."""
    kept = {key: value for key, value in run.items() if key not in HASHES}
    return kept | {"history": {key: value for key, value in run["history"].items() if key != "grad_norm"}}


def write_expected(summary: dict[str, Any]) -> None:
    """Writes the committed file, one line per run."""
    lines = []
    for part, content in summary.items():
        entries = [f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items()]
        lines.append(f"{json.dumps(part)}: {{\n" + ",\n".join(entries) + "\n }")
    EXPECTED.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
