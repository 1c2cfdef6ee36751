"""`check_task`: built-in tasks and the tutorial pass it, and tasks that violate the protocol fail it."""

import ast
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load_recipe

import hftl
from hftl.run.testing import check_task


def test_check_task_accepts_image_classification(image_run):
    for model in ("test_resnet", "test_vit"):
        run, splits, task = hftl.setup_run(image_run(model), hftl.ImageClassification)
        check_task(task, splits, run)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_check_task_accepts_text_classification(pooling, text_run):
    run, splits, task = hftl.setup_run(text_run("full", pooling), hftl.TextClassification)
    check_task(task, splits, run)


def test_tutorial_trains_and_passes_check_task(tmp_path):
    recipe = load_recipe("custom_task")
    data = replace(recipe.DEFAULTS.data, max_train_samples_per_class=3)
    run = replace(recipe.DEFAULTS, data=data, output_dir=str(tmp_path / "run"))
    run = replace(run, train=replace(run.train, num_epochs=2, batch_size_per_device=10, trackers=[]))
    metrics = recipe.main(run)
    assert {"test/parity_accuracy", "test/size_accuracy", "test/loss"} <= set(metrics)
    assert metrics["test/parity_accuracy"] > 0.6 and metrics["test/size_accuracy"] > 0.5


def test_tutorial_has_at_most_60_lines_of_code():
    source = (ROOT / "recipes" / "custom_task.py").read_text()
    nodes = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    excluded = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    lines = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in excluded]
    assert len(lines) <= 60


class PatchedTask:
    """A task with replaced members."""

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
        (lambda task: {"metrics": lambda: [LastBatchMean()]}, "over two batches"),
    ],
)
def test_check_task_rejects_protocol_violations(members, message, image_run):
    run, splits, task = hftl.setup_run(image_run("test_vit"), hftl.ImageClassification)
    with pytest.raises(AssertionError, match=message):
        check_task(PatchedTask(task, **members(task)), splits, run)


class LastBatchMean:
    """A metric that depends on the division into batches: `merge` overwrites the previous batches."""

    value = 0.0

    def update(self, outputs, batch):
        self.value = float(outputs["logits"].mean())

    def merge(self, other):
        self.value = other.value

    def compute(self):
        return {"last": self.value}
