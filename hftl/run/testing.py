"""check_task(): the contract that every task passes, ours or yours."""

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
    """Checks a task against a real model and its own data.

    The head fits the loss; the loss is one finite number per example; metrics of batches equal metrics of the
    whole; declared capabilities can read the predictions; one step changes exactly the parameters that learn; what is
    saved computes the same.

    Args:
        task: Any object with the members of `hftl.tasks.task.Task`.
        splits: Data the task was made for; `train` is used.
        run: Resolved by `prepare`. A small model makes this quick.
        rows: How many rows to use.

    Raises:
        AssertionError: What the task breaks, in a sentence.
    """
    renamed = renamed_members((task, *task.metrics()))
    assert not renamed, " ".join(renamed)
    torch.manual_seed(0)
    model = build_model(run, task.head)
    encoded = task.encode(splits["train"].select(range(rows)), model.processor, None, run.data.max_length)
    examples = encoded.fetch(list(range(rows)), 0)
    whole = task.collate(examples)
    assert isinstance(whole.get("inputs"), dict), "collate must return a dict with 'inputs' (and 'labels')"
    assert "labels" in whole, "collate must return 'labels' for rows that have them"

    model.eval()
    with torch.no_grad():
        outputs = dict(model(whole["inputs"]))
    losses = task.loss(outputs, whole)
    assert losses.shape == (rows,), f"loss must be one number per example, [{rows}]; it is {list(losses.shape)}"
    assert torch.isfinite(losses).all(), f"loss must be finite; it is {losses.tolist()}"
    decoded = task.decode(outputs, whole)
    assert len(decoded) == rows, f"decode must return a row per example, {rows}; it returned {len(decoded)}"
    whole["index"] = torch.arange(rows)
    _check_metrics(task, outputs, whole)
    _check_capabilities(task, outputs, whole)
    for method in ("full", "frozen", "lora"):
        torch.manual_seed(0)
        model = build_model(run, task.head)
        try:
            adapt(model, replace(run.adapt, method=method))
        except AdaptError:
            assert method == "frozen" and not model.head_modules, f"{method} is refused, though the model can take it"
            continue
        _check_step(task, model, whole, run, method)
    _check_saved(task, model, encoded, run)


def _check_capabilities(task: Task, outputs: dict[str, torch.Tensor], whole: Batch) -> None:
    """Declared capabilities exist, and predictions have the columns that those which read them need."""
    known = [each.value for each in Capability]
    # inputs that lack a misspelled one would hide it
    declared = capabilities_of(task) | target_info(getattr(task, "target", task)).capabilities
    unknown = sorted(declared - set(known))
    assert not unknown, f"capabilities {', '.join(unknown)} do not exist; allowed: {', '.join(known)}"
    reading = [each.value for each in (Capability.COMPARE, Capability.INTERVALS) if each in declared]
    needed = needed_columns(asdict(task.head))
    lacking = sorted(needed - set(labeled_rows(task, outputs, whole)[0]))
    assert not reading or needed and not lacking, (
        f"{', '.join(reading)} of {task.name} cannot read its predictions: "
        + (f"rows lack {', '.join(lacking)}" if needed else f"unknown problem_type {task.head.problem_type}")
    )


def _check_metrics(task: Task, outputs: dict[str, torch.Tensor], whole: Batch) -> None:
    """Metrics over two uneven batches, merged from two accumulators, equal those of the whole."""
    together, first, second = task.metrics(), task.metrics(), task.metrics()
    size = len(whole["labels"])
    cut = max(1, size // 3)
    for metric in together:
        metric.update(outputs, whole)
    for metrics, part in ((first, slice(0, cut)), (second, slice(cut, size))):
        for metric in metrics:
            metric.update(rows_of(outputs, part, size), rows_of(whole, part, size))
    for one, other, expected in zip(first, second, together, strict=True):
        one.merge(other)
        found, wanted = one.compute(), expected.compute()
        assert found.keys() == wanted.keys(), (
            f"metric names depend on the batches: {sorted(found)} and {sorted(wanted)}"
        )
        for name, value in wanted.items():
            same = math.isclose(found[name], value, rel_tol=1e-9) or (math.isnan(value) and math.isnan(found[name]))
            assert same, f"metric {name} is {found[name]} over two batches and {value} over one"


def _check_step(task: Task, model: TaskModel, batch: Batch, run: RunConfig, method: str) -> None:
    """Two optimizer steps move every parameter that learns and nothing else."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # what is below a layer that starts at zero (an adapter's second factor, DETR's boxes) has no gradient at first
    steps = 2
    optimizer = make_optimizer(model, replace(run.train, lr=1e-2, head_lr=1e-2, weight_decay=0.0), torch.device("cpu"))
    model.train()
    for _ in range(steps):
        task.loss(model(batch["inputs"]), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    strays = (moved & parameters) - learning
    assert not strays, f"{method}: parameters that do not learn have moved: {sorted(strays)[:5]}"
    head = {name for name in learning if model.in_head(name)}
    assert head or not model.head_modules, f"{method}: no parameter of the head learns"
    assert learning and head <= moved, f"{method}: head parameters did not move: {sorted(head - moved)[:5]}"
    buffers = {name for name in moved - parameters if model.in_backbone(name)}
    assert method == "full" or not buffers, f"{method}: buffers of the backbone have moved: {sorted(buffers)[:5]}"


def _check_saved(task: Task, model: TaskModel, encoded: Examples, run: RunConfig) -> None:
    """Saving verifies itself: it raises when a reader computes something else."""
    from hftl.artifacts.save_model import save_artifact

    with tempfile.TemporaryDirectory() as folder:
        save_artifact(model, task, run, encoded, Path(folder))
