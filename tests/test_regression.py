"""Regression target: metrics and intervals against scikit-learn and scipy, output scaling, early errors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_undrawn
from launch import stopping_after
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

import hftl
from hftl.config.schema import FrozenConfig
from hftl.errors import ConfigError, Stopped
from hftl.models.target_scaling import OutputScale, scale_of
from hftl.run.testing import check_task
from hftl.tasks.targets.regression.metrics import NUMBERS, RegressionMetrics, regression_intervals, regression_scores


@pytest.fixture
def regression_run(text_run, tables):
    def make(method="full", pooling="mean", columns=None, **train):
        data = {"label_column": "length"} if columns is None else {"label_columns": columns}
        run = text_run(method, pooling, **train)
        return replace(run, data=replace(run.data, source=str(tables), **data))

    return make


def random_case(rows, outputs, ties):
    rng = np.random.default_rng(rows)
    labels = rng.normal(50, 10, (rows, outputs)).astype(np.float32)
    predictions = (labels + rng.normal(0, 8, (rows, outputs))).astype(np.float32)
    return (labels.round(-1), predictions.round(-1)) if ties else (labels, predictions)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("rows", "ties"), [(40, False), (101, True), (3, False)])
def test_regression_metrics_match_sklearn_and_scipy(rows, outputs, ties):
    labels, predictions = random_case(rows, outputs, ties)
    names = [f"output{k}" for k in range(outputs)]
    metrics = [RegressionMetrics(names) for _ in range(3)]
    for number, chunk in enumerate(np.array_split(np.random.permutation(rows), 7)):
        batch = {"labels": torch.tensor(labels[chunk])}
        metrics[number % 3].update({"logits": torch.tensor(predictions[chunk])}, batch)
    metrics[1].merge(metrics[2])
    metrics[1].merge(metrics[0])
    scores = metrics[1].compute()
    true, predicted = labels.astype(np.float64), predictions.astype(np.float64)
    expected = {
        "mae": mean_absolute_error(true, predicted),
        "rmse": root_mean_squared_error(true, predicted),
        "r2": r2_score(true, predicted),
        "pearson": np.mean([pearsonr(true[:, k], predicted[:, k])[0] for k in range(outputs)]),
        "spearman": np.mean([spearmanr(true[:, k], predicted[:, k])[0] for k in range(outputs)]),
    }
    for name in NUMBERS:
        assert scores[name] == pytest.approx(expected[name], abs=1e-9, rel=1e-9), name
    assert scores == regression_scores(true, predicted, names), "bitwise identical for any row order"
    assert ("mae_output1" in scores) == (outputs > 1)


def test_regression_metrics_undefined_values_return_nan():
    """Constant labels follow scikit-learn."""
    empty = RegressionMetrics(["y"]).compute()
    assert set(empty) == set(NUMBERS) and all(math.isnan(value) for value in empty.values())
    ones = np.ones((4, 1))
    scores = regression_scores(ones, ones + [[0.0], [1.0], [0.0], [0.0]], ["y"])
    assert scores["r2"] == r2_score(ones, ones + [[0.0], [1.0], [0.0], [0.0]]) and math.isnan(scores["pearson"])
    assert math.isnan(regression_scores(ones, ones * math.nan, ["y"])["mae"])


def test_regression_intervals_match_row_resampling():
    labels, predictions = random_case(101, 2, ties=True)
    names = ["a", "b"]
    intervals = regression_intervals(labels, predictions, names, resamples=300)
    rng = np.random.default_rng(0)
    resampled = []
    for counts in rng.multinomial(101, np.full(101, 1 / 101), 300):
        rows = np.repeat(np.arange(101), counts)
        resampled.append(regression_scores(labels[rows].astype(float), predictions[rows].astype(float), names))
    assert set(intervals) == set(resampled[0])
    for name, interval in intervals.items():
        expected = np.quantile([scores[name] for scores in resampled], [0.025, 0.975])
        assert interval == pytest.approx(expected, abs=1e-6), name


def test_output_scale_fold_preserves_outputs():
    layer = torch.nn.Linear(8, 2)
    features = torch.randn(5, 8)
    unscaled = layer(features)
    scale = OutputScale([2000.0, -1.0], [5.0, 0.01])
    layer.register_forward_hook(scale)
    before = layer(features)
    assert torch.allclose(before, unscaled * torch.tensor([5.0, 0.01]) + torch.tensor([2000.0, -1.0]))
    assert layer.bfloat16()(features.bfloat16()).dtype == torch.float32
    layer.float()._forward_hooks.clear()
    layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    scale.fold(layer)
    assert (layer(features) - before).abs().max() < 0.1  # the cast to bfloat16 rounded the weights


def test_check_task_accepts_regression(regression_run):
    run, splits, task = hftl.setup_run(regression_run(columns=["length", "weight"]), hftl.TextClassification)
    assert task.head.problem_type == "regression" and task.head.num_outputs == 2
    check_task(task, splits, run)


def test_cached_features_train_equal_regression_head(regression_run, tmp_path):
    heads = []
    for name, cache in (("cached", True), ("uncached", False)):
        frozen = FrozenConfig(cache=cache, lr_factors=[1.0], weight_decays=[0.01])
        run = regression_run("frozen", "mean", ["length", "weight"], num_epochs=2)
        run = replace(run, adapt=replace(run.adapt, frozen=frozen), output_dir=str(tmp_path / name))
        run, splits, task = hftl.setup_run(run, hftl.TextClassification)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        history = hftl.fit(accelerator, model, task, splits, run)
        assert history.best["metric"] == "validation/r2"
        layer = model.net.get_submodule(model.head_modules[0])
        assert scale_of(layer) is not None, "the scale is folded on saving"
        heads.append(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1))
    assert torch.allclose(*heads, atol=1e-5)


@pytest.mark.slow
def test_resumed_regression_run_saves_equal_weights(regression_run, tmp_path):
    """Training and checkpoints use standardized outputs; the scale is folded once, after training."""
    weights = []
    for name, stop in (("uninterrupted", None), ("stopped", 5)):
        run = replace(regression_run("full", "mean"), output_dir=str(tmp_path / name), resume="auto")
        if stop:
            with pytest.raises(Stopped), stopping_after(stop):
                run_undrawn("text_classification", run)
        run_undrawn("text_classification", run)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "without a finite number in column(s) length: row 3"),
        (float("nan"), "without a finite number"),
        (float("inf"), "without a finite number"),
    ],
)
def test_nonfinite_regression_label_raises_or_is_skipped(value, message, regression_run, tables):
    train = [json.loads(line) for line in open(tables / "train.jsonl")]
    train[3]["length"] = value
    rows = {"train": train, "test": [json.loads(line) for line in open(tables / "test.jsonl")]}
    with pytest.raises(ConfigError) as error:
        hftl.setup_run(regression_run(), hftl.TextClassification, rows=rows)
    assert any(message in problem for problem in error.value.problems), error.value.problems
    run = regression_run()
    run = replace(run, data=replace(run.data, on_error="skip"))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert [row["row"] for row in run.quarantine] == [3] and "no number" in run.quarantine[0]["reason"]
    assert len(splits["train"]) + len(splits["validation"]) == 63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"length": 7.5}, "column 'length' has the same number (7.5) in all 64 training rows"),
        (lambda row: row | {"length": 1e9 + row["length"] / 100}, "differ by less than float32 resolves"),
        (lambda row: row | {"length": str(row["length"])}, "regression needs numbers"),
    ],
)
def test_setup_with_invalid_regression_target_raises(change, message, regression_run, tables):
    rows = {"train": [change(json.loads(line)) for line in open(tables / "train.jsonl")]}
    run = regression_run()
    run = replace(run, data=replace(run.data, validation_fraction=0.0, problem_type="regression"))
    with pytest.raises(ConfigError) as error:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(message in problem for problem in error.value.problems), error.value.problems
