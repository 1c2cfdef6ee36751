"""Numbers: metrics equal scikit-learn's and scipy's, and the saved network answers in the units of the target."""

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
def number_run(text_run, tables):
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
def test_metrics_equal_scikit_learn_and_scipy_over_any_batches(rows, outputs, ties):
    labels, predictions = random_case(rows, outputs, ties)
    names = [f"output{k}" for k in range(outputs)]
    parts = [RegressionMetrics(names) for _ in range(3)]
    for number, chunk in enumerate(np.array_split(np.random.permutation(rows), 7)):
        batch = {"labels": torch.tensor(labels[chunk])}
        parts[number % 3].update({"logits": torch.tensor(predictions[chunk])}, batch)
    parts[1].merge(parts[2])
    parts[1].merge(parts[0])
    found = parts[1].compute()
    true, said = labels.astype(np.float64), predictions.astype(np.float64)
    wanted = {
        "mae": mean_absolute_error(true, said),
        "rmse": root_mean_squared_error(true, said),
        "r2": r2_score(true, said),
        "pearson": np.mean([pearsonr(true[:, k], said[:, k])[0] for k in range(outputs)]),
        "spearman": np.mean([spearmanr(true[:, k], said[:, k])[0] for k in range(outputs)]),
    }
    for name in NUMBERS:
        assert found[name] == pytest.approx(wanted[name], abs=1e-9, rel=1e-9), name
    assert found == regression_scores(true, said, names), "the order of rows does not matter, to the last bit"
    assert ("mae_output1" in found) == (outputs > 1)


def test_undefined_numbers_are_nan_and_a_constant_target_scores_as_scikit_learn():
    empty = RegressionMetrics(["y"]).compute()
    assert set(empty) == set(NUMBERS) and all(math.isnan(value) for value in empty.values())
    ones = np.ones((4, 1))
    found = regression_scores(ones, ones + [[0.0], [1.0], [0.0], [0.0]], ["y"])
    assert found["r2"] == r2_score(ones, ones + [[0.0], [1.0], [0.0], [0.0]]) and math.isnan(found["pearson"])
    assert math.isnan(regression_scores(ones, ones * math.nan, ["y"])["mae"])


def test_intervals_are_those_of_resampled_rows():
    labels, predictions = random_case(101, 2, ties=True)
    names = ["a", "b"]
    found = regression_intervals(labels, predictions, names, resamples=300)
    rng = np.random.default_rng(0)
    drawn = []
    for counts in rng.multinomial(101, np.full(101, 1 / 101), 300):
        rows = np.repeat(np.arange(101), counts)
        drawn.append(regression_scores(labels[rows].astype(float), predictions[rows].astype(float), names))
    assert set(found) == set(drawn[0])
    for name, ends in found.items():
        assert ends == pytest.approx(np.quantile([each[name] for each in drawn], [0.025, 0.975]), abs=1e-6), name


def test_folding_leaves_the_layer_as_it_answered():
    layer = torch.nn.Linear(8, 2)
    features = torch.randn(5, 8)
    plain = layer(features)
    scale = OutputScale([2000.0, -1.0], [5.0, 0.01])
    layer.register_forward_hook(scale)
    before = layer(features)
    assert torch.allclose(before, plain * torch.tensor([5.0, 0.01]) + torch.tensor([2000.0, -1.0]))
    assert layer.bfloat16()(features.bfloat16()).dtype == torch.float32
    layer.float()._forward_hooks.clear()
    layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    scale.fold(layer)
    assert (layer(features) - before).abs().max() < 0.1  # bfloat16 rounded the weights on the way


def test_regression_passes_the_contract(number_run):
    run, splits, task = hftl.setup_run(number_run(columns=["length", "weight"]), hftl.TextClassification)
    assert task.head.problem_type == "regression" and task.head.num_outputs == 2
    check_task(task, splits, run)


def test_the_cached_head_is_that_of_the_plain_loop(number_run, tmp_path):
    heads = []
    for name, cache in (("cached", True), ("plain", False)):
        frozen = FrozenConfig(cache=cache, lr_factors=[1.0], weight_decays=[0.01])
        run = number_run("frozen", "mean", ["length", "weight"], num_epochs=2)
        run = replace(run, adapt=replace(run.adapt, frozen=frozen), output_dir=str(tmp_path / name))
        run, splits, task = hftl.setup_run(run, hftl.TextClassification)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        history = hftl.fit(accelerator, model, task, splits, run)
        assert history.best["metric"] == "validation/r2"
        layer = model.net.get_submodule(model.head_modules[0])
        assert scale_of(layer) is not None, "folded only when it is saved"
        heads.append(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1))
    assert torch.allclose(*heads, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_training_ends_where_the_other_does(number_run, tmp_path):
    """The head learns in standard units, and its state is saved in them: the scale is folded once, at the end."""
    heads = []
    for name, stop in (("whole", None), ("stopped", 5)):
        run = replace(number_run("full", "mean"), output_dir=str(tmp_path / name), resume="auto")
        if stop:
            with pytest.raises(Stopped), stopping_after(stop):
                run_undrawn("text_classification", run)
        run_undrawn("text_classification", run)
        heads.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all(torch.equal(one, heads[1][key]) for key, one in heads[0].items())


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("length", None, "without a finite number in column(s) length: row 3"),
        ("length", float("nan"), "without a finite number"),
        ("length", float("inf"), "without a finite number"),
    ],
)
def test_a_target_that_is_no_number_is_refused_or_left_out(column, value, said, number_run, tables, tmp_path):
    lines = [json.loads(line) for line in open(tables / "train.jsonl")]
    lines[3][column] = value
    data = {"train": lines, "test": [json.loads(line) for line in open(tables / "test.jsonl")]}
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(number_run(), hftl.TextClassification, rows=data)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
    run = number_run()
    run = replace(run, data=replace(run.data, on_error="skip"))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows=data)
    assert [row["row"] for row in run.quarantine] == [3] and "no number" in run.quarantine[0]["reason"]
    assert len(splits["train"]) + len(splits["validation"]) == 63


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"length": 7.5}, "all 64 training rows have the same number in column 'length' (7.5)"),
        (lambda row: row | {"length": 1e9 + row["length"] / 100}, "digits that float32 does not carry"),
        (lambda row: row | {"length": str(row["length"])}, "a regression needs numbers"),
    ],
)
def test_targets_that_cannot_be_learnt_are_refused(change, said, number_run, tables):
    rows = {"train": [change(json.loads(line)) for line in open(tables / "train.jsonl")]}
    run = number_run()
    run = replace(run, data=replace(run.data, validation_fraction=0.0, problem_type="regression"))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, hftl.TextClassification, rows=rows)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
