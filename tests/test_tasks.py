"""Every task passes the contract, ours and the tutorial's; and the contract notices a task that breaks it."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load_recipe

import hftl
from hftl.run.testing import check_task


def test_image_classification_passes_the_contract(image_run):
    for net in ("test_resnet", "test_vit"):
        run, splits, task = hftl.setup_run(image_run(net), hftl.ImageClassification)
        check_task(task, splits, run)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_text_classification_passes_the_contract(pooling, text_run):
    run, splits, task = hftl.setup_run(text_run("full", pooling), hftl.TextClassification)
    check_task(task, splits, run)


def test_the_tutorial_trains_and_passes_the_contract(tmp_path):
    recipe = load_recipe("custom_task")
    few = replace(recipe.DEFAULTS.data, max_train_samples_per_class=3)
    run = replace(recipe.DEFAULTS, data=few, output_dir=str(tmp_path / "run"))
    run = replace(run, train=replace(run.train, num_epochs=2, batch_size_per_device=10, trackers=[]))
    metrics = recipe.main(run)
    assert {"test/parity_accuracy", "test/size_accuracy", "test/loss"} <= set(metrics)
    assert metrics["test/parity_accuracy"] > 0.6 and metrics["test/size_accuracy"] > 0.5
    code = [line for line in (ROOT / "recipes" / "custom_task.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 60


class Broken:
    """A task with one member replaced."""

    def __init__(self, task, **members):
        self.__dict__.update({name: getattr(task, name) for name in dir(task) if not name.startswith("_")})
        self.__dict__.update(members)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda task: {"loss": lambda outputs, batch: task.loss(outputs, batch).mean()}, "one value per example"),
        (lambda task: {"loss": lambda outputs, batch: task.loss(outputs, batch) * float("nan")}, "must be finite"),
        (lambda task: {"decode": lambda outputs, batch: task.decode(outputs, batch)[1:]}, "one row per example"),
        (lambda task: {"loss": lambda outputs, batch: torch.zeros(8, requires_grad=True) * 1}, "have not changed"),
        (lambda task: {"metrics": lambda: [LastBatch()]}, "over two batches"),
    ],
)
def test_the_contract_notices(members, message, image_run):
    run, splits, task = hftl.setup_run(image_run("test_vit"), hftl.ImageClassification)
    with pytest.raises(AssertionError, match=message):
        check_task(Broken(task, **members(task)), splits, run)


class LastBatch:
    """A metric that remembers the last batch only: a mean of means gone wrong."""

    value = 0.0

    def update(self, outputs, batch):
        self.value = float(outputs["logits"].mean())

    def merge(self, other):
        self.value = other.value

    def compute(self):
        return {"last": self.value}
