"""`check_task`, the contract test for built-in and custom tasks."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hftl.adaptation.apply import adapt
from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.errors import AdaptError
from hftl.evaluation.evaluate import labeled_rows
from hftl.loading.loader import Examples
from hftl.models.build import build_model
from hftl.models.oom_retry import rows_of
from hftl.models.task_model import TaskModel
from hftl.renames import renamed_members
from hftl.tasks.capabilities import Capability, capabilities_of, target_info
from hftl.tasks.predictions import needed_columns
from hftl.tasks.task import Batch, Task
from hftl.training.optim import make_optimizer


def check_task(task: Task, splits: Splits, run: RunConfig, rows: int = 8) -> None:
    """Checks a task with a real model and its own data.

    The head fits the loss; the loss is one finite number per example; metrics accumulated over batches equal metrics
    of all rows at once; declared capabilities can read the predictions; one step changes exactly the trainable
    parameters; the saved model has the same outputs.

    Args:
        task: Any object with the members of `hftl.tasks.task.Task`.
        splits: Data of the task; `train` is used.
        run: Resolved by `setup_run`. A small model makes the check fast.
        rows: Number of rows to use.

    Raises:
        AssertionError: The task violates the contract.
    """
    renamed = renamed_members((task, *task.metrics()))
    assert not renamed, " ".join(renamed)
    torch.manual_seed(0)
    model = build_model(run, task.head)
    encoded = task.encode(splits["train"].select(range(rows)), model.processor, None, run.data.max_length)
    examples = encoded.fetch(list(range(rows)), 0)
    batch = task.collate(examples)
    assert isinstance(batch.get("inputs"), dict), "collate must return a dict with 'inputs' (and 'labels')"
    assert "labels" in batch, "collate must return 'labels' for labeled rows"

    model.eval()
    with torch.no_grad():
        outputs = dict(model(batch["inputs"]))
    losses = task.loss(outputs, batch)
    assert losses.shape == (rows,), f"loss must have shape [{rows}], one value per example; got {list(losses.shape)}"
    assert torch.isfinite(losses).all(), f"loss must be finite; got {losses.tolist()}"
    decoded = task.decode(outputs, batch)
    assert len(decoded) == rows, f"decode must return one row per example, {rows}; got {len(decoded)}"
    batch["index"] = torch.arange(rows)
    _check_metrics(task, outputs, batch)
    _check_capabilities(task, outputs, batch)
    for method in ("full", "frozen", "lora"):
        torch.manual_seed(0)
        model = build_model(run, task.head)
        try:
            adapt(model, replace(run.adapt, method=method))
        except AdaptError:
            headless = method == "frozen" and not model.head_modules
            assert headless, f"adaptation method {method} is rejected although the model supports it"
            continue
        _check_step(task, model, batch, run, method)
    _check_saved(task, model, encoded, run)


def _check_capabilities(task: Task, outputs: dict[str, torch.Tensor], batch: Batch) -> None:
    """Checks that declared capabilities exist and predictions have the columns that they read."""
    known = [each.value for each in Capability]
    # the capabilities of the inputs would mask a misspelled one of the target
    declared = capabilities_of(task) | target_info(getattr(task, "target", task)).capabilities
    unknown = sorted(declared - set(known))
    assert not unknown, f"capabilities {', '.join(unknown)} do not exist; allowed: {', '.join(known)}"
    reading = [each.value for each in (Capability.COMPARE, Capability.INTERVALS) if each in declared]
    needed = needed_columns(asdict(task.head))
    missing = sorted(needed - set(labeled_rows(task, outputs, batch)[0]))
    assert not reading or needed and not missing, (
        f"{', '.join(reading)} of {task.name} cannot read its predictions: "
        + (f"missing columns {', '.join(missing)}" if needed else f"unknown problem_type {task.head.problem_type}")
    )


def _check_metrics(task: Task, outputs: dict[str, torch.Tensor], batch: Batch) -> None:
    """Checks that metrics merged from two uneven batches equal those of the whole batch."""
    whole, first, second = task.metrics(), task.metrics(), task.metrics()
    size = len(batch["labels"])
    cut = max(1, size // 3)
    for metric in whole:
        metric.update(outputs, batch)
    for metrics, rows in ((first, slice(0, cut)), (second, slice(cut, size))):
        for metric in metrics:
            metric.update(rows_of(outputs, rows, size), rows_of(batch, rows, size))
    for merged, second_metric, whole_metric in zip(first, second, whole, strict=True):
        merged.merge(second_metric)
        actual, expected = merged.compute(), whole_metric.compute()
        assert actual.keys() == expected.keys(), (
            f"metric names depend on the batches: {sorted(actual)} and {sorted(expected)}"
        )
        for name, value in expected.items():
            same = math.isclose(actual[name], value, rel_tol=1e-9) or (math.isnan(value) and math.isnan(actual[name]))
            assert same, f"metric {name} is {actual[name]} over two batches and {value} over one"


def _check_step(task: Task, model: TaskModel, batch: Batch, run: RunConfig, method: str) -> None:
    """Checks that two optimizer steps change all trainable parameters and nothing else."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # layers before a zero-initialized one (LoRA's B, DETR's box head) have no gradient in the first step
    steps = 2
    optimizer = make_optimizer(model, replace(run.train, lr=1e-2, head_lr=1e-2, weight_decay=0.0), torch.device("cpu"))
    model.train()
    for _ in range(steps):
        task.loss(model(batch["inputs"]), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    unexpected = (changed & parameters) - trainable
    assert not unexpected, f"{method}: frozen parameters have changed: {sorted(unexpected)[:5]}"
    head = {name for name in trainable if model.in_head(name)}
    assert head or not model.head_modules, f"{method}: no parameter of the head is trainable"
    assert trainable and head <= changed, f"{method}: head parameters have not changed: {sorted(head - changed)[:5]}"
    buffers = {name for name in changed - parameters if model.in_backbone(name)}
    assert method == "full" or not buffers, f"{method}: buffers of the backbone have changed: {sorted(buffers)[:5]}"


def _check_saved(task: Task, model: TaskModel, encoded: Examples, run: RunConfig) -> None:
    """Saves the model, which raises an error if the reloaded model has other outputs."""
    from hftl.artifacts.save_model import save_artifact

    with tempfile.TemporaryDirectory() as folder:
        save_artifact(model, task, run, encoded, Path(folder))
