"""Any number of labels a row: metrics equal scikit-learn's, thresholds are the best, bad labels are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score

import hftl
from hftl.errors import ConfigError
from hftl.run.testing import check_task
from hftl.tasks.registry import MultiLabel
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
def tags_run(text_run, tables):
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
def test_metrics_equal_scikit_learn_over_any_batches(rows, labels, ties):
    true, logits = random_case(rows, labels, ties)
    thresholds = np.linspace(0.3, 0.7, labels).tolist()
    parts = [MultiLabelMetrics(thresholds) for _ in range(3)]
    for number, chunk in enumerate(np.array_split(np.random.permutation(rows), 7)):
        parts[number % 3].update({"logits": logits[chunk]}, {"labels": torch.tensor(true[chunk]).float()})
    parts[1].merge(parts[2])
    parts[1].merge(parts[0])
    found, shares = parts[1].compute(), logits.double().sigmoid().numpy()
    said = shares >= thresholds
    assert set(found) == set(SCORES) and found == multi_label_scores(true, shares, thresholds), "to the last bit"
    assert found["map"] == pytest.approx(average_precision_score(true, shares, average="macro"), abs=1e-9)
    assert found["subset_accuracy"] == accuracy_score(true, said)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average in ("macro", "micro", "weighted"):
            wanted = score(true, said, average=average, zero_division=0)
            assert found[f"{average}_{name}"] == pytest.approx(wanted, abs=1e-12), (average, name)


def test_a_threshold_is_the_best_of_all_on_the_rows_that_chose_it():
    true, logits = random_case(80, 5, ties=True)
    shares = logits.double().sigmoid().numpy()
    true[:, 4] = False
    found = best_thresholds(true, shares)
    assert found[4] == 0.5, "no row has this label"
    for k in range(4):
        every = [f1_score(true[:, k], shares[:, k] >= at) for at in [*np.unique(shares[:, k]), 0.5]]
        assert f1_score(true[:, k], shares[:, k] >= found[k]) == pytest.approx(max(every))
        assert found[k] not in shares[:, k], "half way between two probabilities, so that neither is on the edge"


def test_intervals_are_those_of_resampled_rows():
    true, logits = random_case(90, 4, ties=True)
    shares, thresholds = logits.double().sigmoid().numpy(), [0.4, 0.5, 0.6, 0.5]
    found = multi_label_intervals(true, shares, thresholds, resamples=200)
    drawn = []
    for counts in np.random.default_rng(0).multinomial(90, np.full(90, 1 / 90), 200):
        rows = np.repeat(np.arange(90), counts)
        drawn.append(multi_label_scores(true[rows], shares[rows], thresholds))
    assert set(found) == set(SCORES)
    for name, ends in found.items():
        assert ends == pytest.approx(np.quantile([each[name] for each in drawn], [0.025, 0.975]), abs=1e-9), name


@pytest.mark.parametrize("form", list(FORMS))
def test_every_way_of_writing_labels_gives_the_same_rows(form, tags_run, capsys):
    run, splits, task = hftl.setup_run(tags_run(form), hftl.TextClassification)
    assert "rows without any label: train 8, validation 2, test 3" in capsys.readouterr().out
    assert isinstance(task.target, MultiLabel) and task.head.labels == ("animal", "food", "tool")
    rows = splits["train"].select(range(8))
    found = task.target.labels(
        [dict(zip(rows.column_names, row, strict=True)) for row in zip(*rows[:].values(), strict=True)]
    )
    assert found.tolist() == [[float(n >> bit & 1) for bit in range(3)] for n in range(8)]
    if form == "text":
        check_task(task, splits, run)


@pytest.mark.parametrize(
    ("form", "split", "change", "said", "left"),
    [
        ("list", "test", {"kinds": ["fish"]}, "test has the label(s) fish in 1 row(s), which train lacks", 1),
        ("text", "test", {"joined": "animal|fish"}, "test has the label(s) fish", 1),
        ("flags", "train", {"food": 2}, "cannot be read: row 3 (2 is neither 0 nor 1)", 1),
        ("flags", "train", {"food": None}, "cannot be read: row 3 (no value)", 1),
    ],
)
def test_rows_that_cannot_be_used_are_refused_or_left_out(form, split, change, said, left, tags_run, tables):
    rows = {name: [json.loads(line) for line in open(tables / f"{name}.jsonl")] for name in ("train", "test")}
    rows[split][3] |= change
    run = tags_run(form)
    run = replace(run, data=replace(run.data, problem_type="multi_label_classification"))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
    run = replace(run, data=replace(run.data, on_error="skip"))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert [(row["split"], row["row"]) for row in run.quarantine] == [(split, 3)]


@pytest.mark.parametrize(
    ("data", "change", "said"),
    [
        (FORMS["list"], {"kinds": []}, "no training row has any label"),
        (FORMS["text"], {"joined": None}, "no training row has any label"),
        (FORMS["list"], {"kinds": ["animal"]}, "every training row has the label(s) animal"),
        ({"label_column": "text", "problem_type": "multi_label_classification"}, {}, "does not hold several labels"),
        ({"label_column": "kinds", "label_separator": "|"}, {}, "holds no texts that '|' could separate"),
        ({"label_columns": ["animal", "foot"]}, {}, "there is no column 'foot'. Did you mean 'food'?"),
        ({"label_columns": ["animal"], "label_column": "kinds"}, {}, "say one of them"),
        (
            FORMS["list"] | {"max_train_samples_per_class": 2},
            {},
            "data.max_train_samples_per_class: is for one class a row",
        ),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(data, change, said, text_run, tables):
    rows = {"train": [json.loads(line) | change for line in open(tables / "train.jsonl")]}
    run = text_run()
    run = replace(run, data=replace(run.data, validation_fraction=0.0, **data))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_metrics_of_evaluate_are_refused(tags_run):
    with pytest.raises(ConfigError, match="one class or one number per row"):
        hftl.setup_run(tags_run(metrics=["mauve"]), hftl.TextClassification)
