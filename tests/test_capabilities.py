"""Capabilities by kind of label: supported, or rejected before training, serving and writing; reference: `KINDS`."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import WORDS, run_undrawn
from detection_data import make_coco
from multimodal_data import write_pairs
from pair_data import captioned, positive_pairs, scored_pairs, write_lines
from test_segmentation import scene
from window_data import write_questions, write_tagged

import hftl
from hftl.artifacts.export import export_folder
from hftl.audit.check import NEED_CLASSES
from hftl.cli.main import main
from hftl.config.schema import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.data.source import load_splits
from hftl.errors import ConfigError, HftlError
from hftl.inference import demo
from hftl.run.testing import check_task
from hftl.selection import comparison
from hftl.selection.experiment_plan import make_experiment_plan
from hftl.tasks.capabilities import Capability, TargetInfo, capabilities_of, target_info
from hftl.tasks.predictions import needed_columns
from hftl.tasks.registry import TASKS, unsupported
from hftl.tasks.targets.tagging.target import TaggingTarget

FULL = set(Capability)
NUMERIC = {Capability.COMPARE, Capability.INTERVALS, Capability.EXPORT}
KINDS = {
    # name: task, label kind in messages, supported capabilities
    "image_class": ("image_classification", "one class", FULL),
    "text_class": ("text_classification", "one class", FULL),
    "several_labels": ("text_classification", "several labels", NUMERIC),
    "one_number": ("text_classification", "one number", NUMERIC),
    "several_numbers": ("text_classification", "several numbers", NUMERIC),
    "word_tags": ("token_classification", "word tags", set()),
    "answer_spans": ("question_answering", "answer spans", set()),
    "masks": ("semantic_segmentation", "masks", set()),
    "boxes": ("object_detection", "boxes", set()),
    "scored_pairs": ("text_embedding", "scored pairs", set()),
    "positive_pairs": ("text_embedding", "positive pairs", set()),
    "captions": ("image_text_retrieval", "captions", set()),
    "image_text_class": ("image_text_classification", "one class", FULL - {Capability.DEMO, Capability.EXPORT}),
}


def write_masks(folder):
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 3, "test": 3}.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            for kind, image in zip(("images", "masks"), scene(rng, number), strict=True):
                image.save(folder / split / kind / f"{number:02d}.png")
    (folder / "classes.json").write_text(json.dumps(["ground", "void", "left", "right"]))
    return folder


@pytest.fixture(scope="module")
def data(images, texts, tables, tmp_path_factory):
    """Data settings by kind of label."""
    folder = tmp_path_factory.mktemp("kinds")
    sizes = {"train": 12, "validation": 6, "test": 6}

    def lines(name, make):
        rows = {split: make(split, count, seed) for seed, (split, count) in enumerate(sizes.items())}
        return {"source": write_lines(folder / name, **rows)}

    captions = folder / "captions"
    return {
        "image_class": {"source": str(images)},
        "text_class": {"source": str(texts)},
        "several_labels": {"source": str(tables), "label_columns": tuple(WORDS)},
        "one_number": {"source": str(tables), "label_column": "length"},
        "several_numbers": {"source": str(tables), "label_columns": ("length", "weight")},
        "word_tags": {"source": str(write_tagged(folder / "tags"))},
        "answer_spans": {"source": str(write_questions(folder / "answers"))},
        "masks": {"source": str(write_masks(folder / "masks"))},
        "boxes": {"source": str(make_coco(folder / "boxes"))},
        "scored_pairs": lines("scored", lambda _, count, seed: scored_pairs(count, seed)),
        "positive_pairs": lines("positive", lambda _, count, seed: positive_pairs(count, seed)),
        "captions": lines(
            "captions", lambda split, count, seed: captioned(captions / split, count, lists=True, seed=seed)
        ),
        "image_text_class": {"source": str(write_pairs(folder / "mixed", sizes)), "image_column": "picture"},
    }


@pytest.fixture(scope="module")
def tasks(data):
    """Task and splits by kind of label."""
    tasks = {}
    for kind, (name, _, _) in KINDS.items():
        splits = load_splits(DataConfig(**data[kind]))
        tasks[kind] = TASKS[name](splits), splits
    return tasks


def write_metadata(task, folder):
    """Writes the metadata of a saved model without weights; commands that load weights fail with other messages."""
    metadata = {"task": task.name, "state": task.state(), "head": asdict(task.head), "sklearn_head": None}
    folder.mkdir(parents=True)
    (folder / "hftl.json").write_text(json.dumps(metadata))
    return folder


def make_run(kind, data, method="full", **settings):
    """Returns a run whose model does not exist, so that training is impossible."""
    train = TrainConfig(batch_size_per_device=2, trackers=[])
    config = DataConfig(**data[kind]), ModelConfig("no/model"), AdaptConfig(method), train
    return RunConfig(*config, task=KINDS[kind][0], **settings)


def assert_rejected(message, task, capability):
    """Checks that the message contains the problem with task, label kind and allowed tasks."""
    problem = unsupported(task, capability)
    assert problem and problem in message, message
    assert f"{task.name} ({target_info(task.target).label_kind}); allowed: " in problem
    assert "_classification (one class" in problem.partition("allowed: ")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_capabilities_of_label_kind_match_table(kind, tasks):
    task, _ = tasks[kind]
    name, label_kind, expected = KINDS[kind]
    assert (task.name, target_info(task.target).label_kind) == (name, label_kind)
    assert set(capabilities_of(task)) == expected
    for capability in Capability:
        assert bool(unsupported(task, capability)) == (capability not in expected)
    columns = needed_columns(asdict(task.head))
    assert bool(columns) == (Capability.COMPARE in expected) == (Capability.INTERVALS in expected)


def test_table_covers_every_built_in_target():
    label_kinds = {label_kind for _, label_kind, _ in KINDS.values()} | {"numbers"}
    targets = [target for task in TASKS.values() for target in task.target_types]
    assert all(target_info(target).label_kind in label_kinds for target in targets)
    assert {name for name, _, _ in KINDS.values()} == set(TASKS)


def test_compare_command_rejects_tags_before_training(tasks, data, tiny_bert, tmp_path, capsys, monkeypatch):
    arguments = ["compare", data["word_tags"]["source"], "--model", tiny_bert, "--methods", "scratch", "full"]
    config = tmp_path / "short.yaml"
    config.write_text("train: {max_steps: 1, trackers: [], batch_size_per_device: 4}")
    arguments += ["--num_seeds", "1", "--config", str(config), "--output_dir", str(tmp_path / "runs")]

    def run_in_this_process(function, *values, **_):
        assert function is not comparison.train, "training started"
        return function(*values)

    monkeypatch.setattr(comparison, "run_in_child", run_in_this_process)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and not (tmp_path / "runs").exists() and "accuracy" not in printed.out
    assert_rejected(printed.err, tasks["word_tags"][0], Capability.COMPARE)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_reject_only_unsupported_label_kinds(kind, tasks, data, tmp_path, monkeypatch):
    task, _ = tasks[kind]
    folder = write_metadata(task, tmp_path / "model")
    monkeypatch.setattr(demo, "_need_gradio", lambda: None)
    monkeypatch.setattr(demo, "free_port", lambda *_: 0)
    calls = {
        Capability.COMPARE: lambda: make_experiment_plan(
            make_run(kind, data), ["scratch", "full"], 1, tmp_path / "runs", False
        ),
        Capability.PROBE: lambda: hftl.setup_run(make_run(kind, data, "probe", output_dir=str(tmp_path / "run"))),
        Capability.DEMO: lambda: demo.serve(str(folder)),
        Capability.EXPORT: lambda: export_folder(folder, "torch", tmp_path / "export"),
    }
    for capability, call in calls.items():
        if capability not in capabilities_of(task):
            with pytest.raises(ConfigError) as caught:
                call()
            assert_rejected(str(caught.value), task, capability)
            continue
        try:
            call()
        except HftlError as error:  # the model has no weights
            assert "does not support" not in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_check_logs_unsupported_checks(kind, tasks, data, tmp_path, capsys):
    task, _ = tasks[kind]
    config = DataConfig(**data[kind])
    checked = hftl.check(config, output=tmp_path / "check")
    need_classes = [name for name in NEED_CLASSES if name != "label_errors"]  # without a model
    if Capability.CLASS_CHECKS in capabilities_of(task):
        assert all(checked[name].checked for name in need_classes)
        return
    # scored pairs are either an embedding or a regression task, so the message names no task
    problem = "checks that compare classes do not support "
    problem += f"{task.name} ({KINDS[kind][1]}); allowed: " if kind != "scored_pairs" else ""
    assert all(not checked[name].checked and problem in checked[name].description for name in need_classes)
    assert f"(unlabelled, conflicting_labels, class_imbalance: Not checked: {problem}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--fail_on: conflicting_labels: ") as caught:
        hftl.check(config, output=tmp_path / "again", fail_on=["leaks", "conflicting_labels"])
    assert problem in str(caught.value)
    assert not hftl.check(config, output=tmp_path / "defaults", fail_on=[]).left_out, "a default was rejected"


class Undeclared(TaggingTarget):
    """A custom target without declared capabilities."""

    info = None


def test_target_without_info_has_no_capabilities(tasks):
    task = tasks["word_tags"][0]
    task = type(task).restored(task.state())
    task.target = Undeclared(task.target.column, task.target.tags, task.target.words)
    assert not capabilities_of(task)
    assert "token_classification (Undeclared); allowed: " in unsupported(task, Capability.COMPARE)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"comparison"}, "comparison do not exist; allowed: compare"),
        ({Capability.COMPARE}, "cannot read its predictions"),
    ],
)
def test_check_task_rejects_false_capabilities(declared, message, tasks, data, tiny_bert, monkeypatch):
    task, splits = tasks["word_tags"]
    monkeypatch.setattr(task.target, "info", TargetInfo("word tags", frozenset(declared)), raising=False)
    run = replace(make_run("word_tags", data), model=ModelConfig(tiny_bert))
    run, splits, _ = hftl.setup_run(replace(run, output_dir="unused"))
    with pytest.raises(AssertionError, match=message):
        check_task(task, splits, run)


def test_report_requires_intervals_capability(images, tiny_timm, tmp_path):
    from hftl.reporting.run_record import RunRecord

    run = RunConfig(
        DataConfig(source=str(images)),
        ModelConfig(tiny_timm["test_resnet"]),
        train=TrainConfig(max_steps=1, batch_size_per_device=8, trackers=[]),
        output_dir=str(tmp_path / "run"),
    )
    run_undrawn("image_classification", run)
    assert "accuracy" in RunRecord(tmp_path / "run").intervals("test")
    file = tmp_path / "run" / "model" / "hftl.json"
    metadata = json.loads(file.read_text())
    assert metadata["capabilities"] == sorted(Capability)
    for capabilities, has_intervals in ((["compare"], False), (None, True)):  # None: files of version 0.1.0
        file.write_text(json.dumps(metadata | {"capabilities": capabilities}))
        assert bool(RunRecord(tmp_path / "run").intervals("test")) == has_intervals
