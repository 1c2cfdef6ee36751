"""hftl.renames: answers to names of 0.1.0, and the upgrade of run folders that it wrote (tests/fixtures/runs_0_1_0)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import hftl
from hftl.artifacts.export import export_folder
from hftl.artifacts.save_model import load_model_and_task
from hftl.cli.main import main
from hftl.config.parse import load_saved_config, parse_config
from hftl.config.schema import RunConfig, leaves
from hftl.errors import ConfigError
from hftl.inference.batch_inference import evaluate_saved
from hftl.renames import (
    FINDINGS,
    FLAGS,
    MEMBERS,
    PYTHON_NAMES,
    RECORD_KEYS,
    SETTINGS,
    VALUES,
    renamed_members,
    upgrade_record,
    upgrade_settings,
)
from hftl.reporting import write_report
from hftl.reporting.run_record import RunRecord

RUNS = ROOT / "tests" / "fixtures" / "runs_0_1_0"
FINISHED = ("image_full", "text_pooled", "text_lora", "image_knn")


@pytest.fixture
def old_runs(tmp_path, monkeypatch) -> Path:
    """A copy of the old run folders as working directory: their paths are relative."""
    folder = tmp_path / "runs_0_1_0"
    shutil.copytree(RUNS, folder)
    monkeypatch.chdir(folder)
    return folder


def test_tables_name_existing_targets():
    settings = leaves(RunConfig())
    assert not SETTINGS.keys() & settings.keys() and {*SETTINGS.values()} <= settings.keys()
    assert {setting for setting, _ in VALUES} <= settings.keys()
    assert all(hasattr(hftl, name) for name in PYTHON_NAMES.values() if "." not in name)


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_old_setting_raises_with_new_name(old, new, tmp_path):
    content: object = 1
    for name in reversed(old.split(".")):
        content = {name: content}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(content))
    for argv in ([f"--{old}", "1"], ["--config", str(file)]):
        with pytest.raises(ConfigError, match=rf"{old} was renamed to {new}\.$"):
            parse_config(RunConfig(), argv)


@pytest.mark.parametrize(("setting", "old", "new"), [(setting, old, new) for (setting, old), new in VALUES.items()])
def test_old_value_raises_with_new_value(setting, old, new):
    with pytest.raises(ConfigError, match=f"{setting}: '{old}' was renamed to '{new}'"):
        parse_config(RunConfig(), [f"--{setting}", old])


def test_old_flags_and_findings_raise_with_new_names(capsys, tmp_path):
    for old, new in FLAGS.items():
        with pytest.raises(SystemExit):
            main(["quickstart", old, "1"])
        assert f"{old} was renamed to {new}" in capsys.readouterr().err
    for old, new in FINDINGS.items():
        with pytest.raises(SystemExit):
            main(["check", "embedded:digits", "--output", str(tmp_path), "--fail_on", old])
        assert f"'{old}' was renamed to '{new}'" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), PYTHON_NAMES.items())
def test_old_python_name_raises_with_new_name(old, new):
    with pytest.raises(AttributeError, match=rf"hftl\.{old} was renamed to hftl\.{new}$"):
        hftl.__getattr__(old)


@pytest.mark.parametrize(("old", "new"), MEMBERS.items())
def test_old_member_of_custom_task_is_rejected(old, new, image_run):
    target_type = type("Mine", (hftl.ImageClassification,), {old: ()})
    with pytest.raises(ConfigError, match=rf"task: Mine\.{old} was renamed to {new}\. Rename it\."):
        hftl.setup_run(image_run(), target_type)
    assert renamed_members([SimpleNamespace(**{new: ()})]) == []


def test_old_member_of_target_is_rejected(image_run):
    class Renamed(hftl.ImageClassification):
        def __init__(self, splits):
            super().__init__(splits)
            self.target.tune = lambda metrics: None
            hftl.SupervisedTask.__init__(self, self.inputs, self.target)

    with pytest.raises(ConfigError, match=r"\.tune was renamed to tune_thresholds"):
        hftl.setup_run(image_run(), Renamed)


def test_upgrade_replaces_keys_at_any_depth_once():
    for old, new in RECORD_KEYS.items():
        assert upgrade_record({"a": [{old: 1}]}) == {"a": [{new: 1}]}
        assert upgrade_record(upgrade_record({old: 1})) == {new: 1}
    of_data = {"state": {"kinds": {"trained": "text"}}, "classes": {"train": {"shown": 4}}}
    assert upgrade_record(of_data) == of_data
    assert upgrade_settings({"adapt.batch_norm": "keep", "train.lr": 1.0}) == {
        "adapt.batch_norm": "frozen",
        "train.lr": 1.0,
    }


@pytest.mark.parametrize("name", FINISHED)
def test_finished_old_run_opens_everywhere(name, old_runs, capsys):
    expected = json.loads((old_runs / name / "predictions.json").read_text())
    assert isinstance(load_saved_config(old_runs / name / "config.yaml"), RunConfig)
    model, task = load_model_and_task(old_runs / name)
    assert model is not None and task.head.model_class
    inputs, rows = expected["inputs"], expected["predictions"]
    predictions = hftl.load(name).predict(inputs)
    for prediction, row in zip(predictions, rows, strict=True):
        assert prediction["prediction"] == row["prediction"]
        assert np.isclose(prediction["confidence"], row["confidence"], atol=1e-4)
    metrics = evaluate_saved(name)
    written = json.loads((old_runs / name / "metrics.json").read_text())
    for metric, value in metrics.items():
        assert np.isclose(value, written[metric], atol=1e-4), metric
    record = RunRecord(name)
    assert (
        record.facts["adapt"]["trainable"]
        == json.loads((old_runs / name / "report.json").read_text())["adapt"]["trained"]
    )
    page = write_report(name)
    assert page.read_text().count("<section") > 3


@pytest.mark.parametrize("name", ["image_full", "text_pooled"])
def test_finished_old_run_exports(name, old_runs):
    report = export_folder(name, "onnx", int8=False)
    assert report["files"]


@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_finished_old_run_is_pushed(hub, old_runs):
    hftl.push("image_full", "alice/old")


def test_unfinished_old_run_is_rejected_with_way_out(old_runs):
    saved = load_saved_config("image_unfinished/config.yaml")

    run = replace(saved, resume="auto", output_dir="image_unfinished")
    with pytest.raises(
        ConfigError, match=r"unfinished run of another version .*checkpoint format 1; allowed: 2.*Finish it"
    ):
        hftl.setup_run(run, hftl.ImageClassification)
