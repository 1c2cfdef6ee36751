"""Multi-label target: metrics and intervals against scikit-learn, threshold tuning, label formats, early errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score

import hftl
from hftl.errors import ConfigError
from hftl.run.testing import check_task
from hftl.tasks.registry import MultiLabelTarget
from hftl.tasks.targets.multi_label.metrics import (
    SCORES,
    MultiLabelMetrics,
    best_thresholds,
    multi_label_intervals,
    multi_label_scores,
)

FORMS = {
    "list": {"label_column": "kinds"},
    "text": {"label_column": "joined", "label_separator": "|"},
    "flags": {"label_columns": ["animal", "food", "tool"]},
}


@pytest.fixture
def multi_label_run(text_run, tables):
    def make(form="list", method="full", pooling="mean", **train):
        run = text_run(method, pooling, **train)
        return replace(run, data=replace(run.data, source=str(tables), **FORMS[form]))

    return make


def random_case(rows, labels, ties):
    rng = np.random.default_rng(rows)
    true = rng.random((rows, labels)) < np.linspace(0.05, 0.8, labels)
    true[0], true[1] = True, False
    logits = rng.normal(size=(rows, labels)) + true
    return true, torch.tensor(logits.round(1) if ties else logits, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:No positive class")
@pytest.mark.parametrize(("rows", "labels", "ties"), [(60, 3, False), (101, 6, True), (2, 4, False)])
def test_multi_label_metrics_match_sklearn(rows, labels, ties):
    true, logits = random_case(rows, labels, ties)
    thresholds = np.linspace(0.3, 0.7, labels).tolist()
    metrics = [MultiLabelMetrics(thresholds) for _ in range(3)]
    for number, chunk in enumerate(np.array_split(np.random.permutation(rows), 7)):
        metrics[number % 3].update({"logits": logits[chunk]}, {"labels": torch.tensor(true[chunk]).float()})
    metrics[1].merge(metrics[2])
    metrics[1].merge(metrics[0])
    scores, probs = metrics[1].compute(), logits.double().sigmoid().numpy()
    predictions = probs >= thresholds
    assert set(scores) == set(SCORES) and scores == multi_label_scores(true, probs, thresholds), "bitwise identical"
    assert scores["map"] == pytest.approx(average_precision_score(true, probs, average="macro"), abs=1e-9)
    assert scores["subset_accuracy"] == accuracy_score(true, predictions)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average in ("macro", "micro", "weighted"):
            expected = score(true, predictions, average=average, zero_division=0)
            assert scores[f"{average}_{name}"] == pytest.approx(expected, abs=1e-12), (average, name)


def test_best_thresholds_maximize_f1_per_label():
    true, logits = random_case(80, 5, ties=True)
    probs = logits.double().sigmoid().numpy()
    true[:, 4] = False
    thresholds = best_thresholds(true, probs)
    assert thresholds[4] == 0.5, "no row has this label"
    for k in range(4):
        scores = [f1_score(true[:, k], probs[:, k] >= threshold) for threshold in [*np.unique(probs[:, k]), 0.5]]
        assert f1_score(true[:, k], probs[:, k] >= thresholds[k]) == pytest.approx(max(scores))
        assert thresholds[k] not in probs[:, k], "thresholds are midpoints between probabilities"


def test_multi_label_intervals_match_row_resampling():
    true, logits = random_case(90, 4, ties=True)
    probs, thresholds = logits.double().sigmoid().numpy(), [0.4, 0.5, 0.6, 0.5]
    intervals = multi_label_intervals(true, probs, thresholds, resamples=200)
    resampled = []
    for counts in np.random.default_rng(0).multinomial(90, np.full(90, 1 / 90), 200):
        rows = np.repeat(np.arange(90), counts)
        resampled.append(multi_label_scores(true[rows], probs[rows], thresholds))
    assert set(intervals) == set(SCORES)
    for name, interval in intervals.items():
        expected = np.quantile([scores[name] for scores in resampled], [0.025, 0.975])
        assert interval == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("form", list(FORMS))
def test_label_formats_return_equal_labels(form, multi_label_run, capsys):
    run, splits, task = hftl.setup_run(multi_label_run(form), hftl.TextClassification)
    assert "rows without labels: train 8, validation 2, test 3" in capsys.readouterr().out
    assert isinstance(task.target, MultiLabelTarget) and task.head.labels == ("animal", "food", "tool")
    rows = splits["train"].select(range(8))
    labels = task.target.labels(
        [dict(zip(rows.column_names, row, strict=True)) for row in zip(*rows[:].values(), strict=True)]
    )
    assert labels.tolist() == [[float(n >> bit & 1) for bit in range(3)] for n in range(8)]
    if form == "text":
        check_task(task, splits, run)


@pytest.mark.parametrize(
    ("form", "split", "change", "message"),
    [
        ("list", "test", {"kinds": ["fish"]}, "test has 1 row(s) with label(s) 'fish', missing from train"),
        ("text", "test", {"joined": "animal|fish"}, "test has 1 row(s) with label(s) 'fish'"),
        ("flags", "train", {"food": 2}, "unreadable labels in column(s) 'animal', 'food', 'tool': row 3 (2"),
        ("flags", "train", {"food": None}, "unreadable labels in column(s) 'animal', 'food', 'tool': row 3 ("),
    ],
)
def test_invalid_multi_label_rows_raise_or_are_skipped(form, split, change, message, multi_label_run, tables):
    rows = {name: [json.loads(line) for line in open(tables / f"{name}.jsonl")] for name in ("train", "test")}
    rows[split][3] |= change
    run = multi_label_run(form)
    run = replace(run, data=replace(run.data, problem_type="multi_label_classification"))
    with pytest.raises(ConfigError) as error:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(message in problem for problem in error.value.problems), error.value.problems
    run = replace(run, data=replace(run.data, on_error="skip"))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert [(row["split"], row["row"]) for row in run.quarantine] == [(split, 3)]


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (FORMS["list"], {"kinds": []}, "no training row has a label"),
        (FORMS["text"], {"joined": None}, "no training row has a label"),
        (FORMS["list"], {"kinds": ["animal"]}, "label(s) 'animal' occur in every training row"),
        ({"label_column": "text", "problem_type": "multi_label_classification"}, {}, "is not multi-label"),
        ({"label_column": "kinds", "label_separator": "|"}, {}, "'|' does not apply to column 'kinds'"),
        ({"label_columns": ["animal", "foot"]}, {}, "there is no column 'foot'. Did you mean 'food'?"),
        ({"label_columns": ["animal"], "label_column": "kinds"}, {}, "Set only one"),
        (
            FORMS["list"] | {"max_train_samples_per_class": 2},
            {},
            "data.max_train_samples_per_class: applies to single-label classification",
        ),
    ],
)
def test_setup_with_invalid_multi_label_data_raises(data, change, message, text_run, tables):
    rows = {"train": [json.loads(line) | change for line in open(tables / "train.jsonl")]}
    run = text_run()
    run = replace(run, data=replace(run.data, validation_fraction=0.0, **data))
    with pytest.raises(ConfigError) as error:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(message in problem for problem in error.value.problems), error.value.problems


def test_setup_rejects_evaluate_metric_for_multi_label(multi_label_run):
    with pytest.raises(ConfigError, match="one class or one number per row"):
        hftl.setup_run(multi_label_run(metrics=["mauve"]), hftl.TextClassification)
