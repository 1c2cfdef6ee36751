"""Metric accumulators for any batches and processes: classification against scikit-learn, mean loss, `evaluate`."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from hftl.tasks.metrics import EvaluateMetric, MeanLoss, metric_problems
from hftl.tasks.targets.single_label.metrics import BUILT_IN, ClassificationMetrics


def random_case(seed, rows, classes, present):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present, rows)
    logits = rng.normal(size=(rows, classes)).astype(np.float32)
    logits[np.arange(rows), labels] += rng.random(rows) * 2
    return torch.tensor(logits), torch.tensor(labels)


@pytest.mark.parametrize(("rows", "classes", "present"), [(50, 3, 3), (200, 7, 4), (1, 2, 2), (17, 10, 10)])
def test_classification_metrics_match_sklearn(rows, classes, present):
    logits, labels = random_case(rows, rows, classes, present)
    metrics = [ClassificationMetrics(classes) for _ in range(3)]
    for number, chunk in enumerate(torch.arange(rows).split(5)):
        metrics[number % 3].update({"logits": logits[chunk]}, {"labels": labels[chunk]})
    metrics[0].merge(metrics[1])
    metrics[0].merge(metrics[2])
    scores, predictions = metrics[0].compute(), logits.argmax(-1)
    assert set(scores) == set(BUILT_IN)
    assert scores["accuracy"] == accuracy_score(labels, predictions)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average in ("macro", "micro", "weighted"):
            expected = score(labels, predictions, average=average, zero_division=0)
            assert scores[f"{average}_{name}"] == pytest.approx(expected, abs=1e-12), (average, name)


def test_mean_loss_in_any_order_is_exact():
    values = torch.tensor(np.random.default_rng(0).lognormal(sigma=8, size=1000).astype(np.float32))
    exact = float(sum(map(Fraction, values.tolist())) / 1000)
    for order in (torch.arange(1000), torch.randperm(1000)):
        means = [MeanLoss(), MeanLoss()]
        for number, chunk in enumerate(values[order].split(7)):
            means[number % 2].update_losses(chunk)
        means[0].merge(means[1])
        assert means[0].compute()["loss"] == exact


def test_mean_loss_with_nonfinite_loss_returns_nan():
    mean = MeanLoss()
    mean.update_losses(torch.tensor([1.0, float("nan")]))
    assert math.isnan(mean.compute()["loss"])
    assert math.isnan(MeanLoss().compute()["loss"])


def test_evaluate_metric_loads_local_script(tmp_path):
    script = tmp_path / "disagreement" / "disagreement.py"
    script.parent.mkdir()
    script.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Disagreement(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        number = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': number, 'references': number})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'disagreement': sum(p != r for p, r in zip(predictions, references)) / len(references)}\n"
    )
    first, second = EvaluateMetric(str(script)), EvaluateMetric(str(script))
    logits, labels = random_case(0, 40, 3, 3)
    first.update({"logits": logits[:30]}, {"labels": labels[:30]})
    second.update({"logits": logits[30:]}, {"labels": labels[30:]})
    first.merge(second)
    assert first.compute()["disagreement"] == pytest.approx(float((logits.argmax(-1) != labels).float().mean()))
    assert metric_problems([str(script)]) == []
    problem = metric_problems(["no_such_metric"])[0]
    assert "no_such_metric" in problem and "accuracy" in problem
