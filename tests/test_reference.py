"""`tests.reference`: comparison of results, and runs and rejections of every task; reference: expected.json."""

import copy

import pytest
from reference.broken_inputs import BROKEN
from reference.cells import RUNS
from reference.comparison import (
    EXPECTED,
    differences,
    digest_inputs,
    read_expected,
    readable,
    rounded,
    setting_of,
    summarize,
    unexpected,
)
from reference.renames import Renames
from reference.trees import ROOT, finish, start

TABLE = "# comment\na.eval_every\ta.eval_steps\na.pool=stock\ta.pool=default\nlr/head\trate/head\n"
KNOWN = {"a.eval_every": (), "a.lr": (), "a.pool": ("auto", "stock")}


def make_result() -> dict:
    """Returns the result of a worker for two cells."""
    run = {
        "settings": {"train.lr": 0.1, "output_dir": "runs/one"},
        "history": [{"step": 1, "train/loss": 0.5}],
        "metrics": {"test/accuracy": 0.25},
        "files": ["config.yaml"],
        "weights": {"model.safetensors:w": "ab"},
        "predictions": {"prediction": "cd"},
        "problems": [],
        "error": "",
    }
    rejected = {"problems": [{"setting": None, "message": "train.lr: -1 is out of range"}], "error": ""}
    return {"machine": {"threads": 1}, "settings": ["train.lr"], "cells": {"one": run, "two": rejected}}


def test_reference_has_a_run_per_task_and_60_rejections():
    expected = read_expected(Renames.read())
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert {recipe for recipe, _ in RUNS.values()} == {recipe for recipe, _ in BROKEN.values()} | {"auto"} == recipes
    assert expected["runs"].keys() == RUNS.keys() and expected["rejected"].keys() == BROKEN.keys()
    assert len(BROKEN) >= 60 and all(expected["rejected"].values())
    assert EXPECTED.stat().st_size < 150_000


def test_renames_convert_flags_for_both_trees():
    renames = Renames(TABLE)
    flags = {"a.eval_steps": "3", "a.lr": "1", "a.pool": "default", "a.nonsense": "2"}
    old = {"a.eval_every": "3", "a.lr": "1", "a.pool": "stock", "a.nonsense": "2"}
    assert renames.for_tree(flags, KNOWN) == old
    new = {"a.eval_steps": (), "a.lr": (), "a.pool": ("auto", "default")}
    assert renames.for_tree(flags, new) == flags
    assert renames.settings(old) == renames.settings(flags) == flags


@pytest.mark.parametrize("table", ["a b\n", "a\tb\tc\n", "a\tb\nc\tb\n", "a\tb\nb\tc\n"])
def test_renames_reject_ambiguous_table(table):
    with pytest.raises(ValueError, match=r"renames\.tsv"):
        Renames(table)


@pytest.mark.parametrize(
    ("message", "setting"),
    [
        ("command line: train.lr: 'x' is not allowed", "train.lr"),
        ("broken/wrong.yaml: there is no setting 'train.epochs'.", "train.epochs"),
        ("broken/not.yaml, line 2: not valid YAML (…)", "config"),
        ("data.source is empty: say --data.source …", "data.source"),
        ("a.eval_every: 0 is out of range", "a.eval_steps"),
        ("Something else: happened", "?Something else: happened"),
    ],
)
def test_setting_of_returns_new_name_of_setting(message, setting):
    assert setting_of({"setting": None, "message": message}, Renames(TABLE)) == setting
    assert setting_of({"setting": "a.eval_every", "message": message}, Renames(TABLE)) == "a.eval_steps"


def test_differences_returns_one_line_per_change():
    """Each leaf of a result is changed in turn; equal results have no differences."""
    renames = Renames("")
    old = readable(make_result(), renames)
    assert differences(old, copy.deepcopy(old)) == []
    changes = [
        ("one", lambda cell: cell["settings"].update({"train.lr": 0.2})),
        ("one", lambda cell: cell["history"][0].update({"train/loss": 0.5000001})),
        ("one", lambda cell: cell["history"].append({"step": 2})),
        ("one", lambda cell: cell["metrics"].pop("test/accuracy")),
        ("one", lambda cell: cell["files"].append("report.html")),
        ("one", lambda cell: cell["weights"].update({"model.safetensors:w": "xy"})),
        ("one", lambda cell: cell["predictions"].update({"other": "xy"})),
        ("two", lambda cell: cell["problems"].append("train.lr")),
        ("two", lambda cell: cell.update({"error": "TypeError"})),
    ]
    for name, change in changes:
        new = copy.deepcopy(old)
        change(new["cells"][name])
        lines = differences(old, new)
        assert len(lines) == 1 and lines[0].startswith(f"{name}: "), lines


def test_unexpected_compares_hashes_on_same_machine_only():
    result = readable(make_result(), Renames(""))
    expected = summarize(result, {"images": "ab"})
    changed = copy.deepcopy(result)
    changed["cells"]["one"]["weights"] = {"model.safetensors:w": "xy"}
    changed["cells"]["one"]["metrics"]["test/accuracy"] = rounded(0.25 + 5e-5)
    assert len(unexpected(summarize(changed, {"images": "ab"}), expected)) == 1
    changed["machine"] = {"threads": 2}
    assert unexpected(summarize(changed, {"images": "xy"}), expected) == []
    changed["cells"]["one"]["metrics"]["test/accuracy"] = 0.2502
    assert len(unexpected(summarize(changed, {"images": "ab"}), expected)) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_and_rejections_match_committed_reference(tmp_path):
    result = readable(finish(start(ROOT, tmp_path), tmp_path), Renames.read())
    summary = summarize(result, digest_inputs(tmp_path / "material"))
    lines = unexpected(summary, read_expected(Renames.read()))
    assert lines == [], "\n".join(lines)
