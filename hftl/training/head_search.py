"""Head search: trains heads with a grid of settings in parallel on cached features, selected on validation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hftl.atomic_files import write_text
from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.distributed import run_on_main
from hftl.errors import NonfiniteError, Stopped
from hftl.features.cache import Features, compute_features
from hftl.features.extractor import linear_head
from hftl.heads.batched_heads import BatchedHeads, HeadSetting
from hftl.loading.loader import Share, train_batches
from hftl.loading.step_plan import StepPlan, make_step_plan
from hftl.logging import log
from hftl.models.target_scaling import scale_of
from hftl.models.task_model import TaskModel
from hftl.run_folder.folder import get_run_folder
from hftl.run_folder.history import History, Recorder, finite
from hftl.tasks.metrics import MeanLoss, all_metrics
from hftl.tasks.task import Task
from hftl.training.best_checkpoint import BestMetric
from hftl.training.optim import lr_factor
from hftl.training.signals import StopSignal
from hftl.training.training_state import broadcast
from hftl.training.validation import unlogged_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

HEADS = "heads.json"
"""File in the run folder with the settings and best validation metrics of every head."""


def fit_heads(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Trains heads of a frozen `model` on cached features and puts the best one on validation into `model`.

    Rows and steps are the same as in `fit`, so a single head gives the result of `fit` without cached features (to
    rounding). There are no checkpoints: an interrupted run trains the heads again, which takes seconds with cached
    features.

    Args:
        accelerator: From `create_accelerator`. All processes compute features; the main process trains the heads.
        model: From `build_model` and `adapt`; its head is changed in place.
        task: Computes the loss per row.
        splits: `train`, and `validation` if it exists; without it, only the default setting is trained.
        run: Uses `adapt.frozen` for the grid.

    Returns:
        Losses, learning rates and metrics of the selected head by step; heads.json has all heads.

    Raises:
        FeatureError: Features cannot be computed or cached.
        NonfiniteError: No head has a finite loss.
        Stopped: A stop signal was received.
    """
    config, frozen, started = run.train, run.adapt.frozen, time.perf_counter()
    head = linear_head(model)
    assert head is not None
    views = range(frozen.num_views) if task.modality == "image" and frozen.num_views else [None]
    if views == [None] and task.modality == "image" and run.data.augment.any:
        log("adapt: frozen without augmentation; --adapt.frozen.num_views N trains on N augmented views per image")
    if frozen.num_views and task.modality != "image":
        log("adapt: adapt.frozen.num_views is ignored; it applies to images only")
    features = {"train": [_features(accelerator, model, task, splits, run, "train", view) for view in views]}
    if "validation" in splits:
        features["validation"] = [_features(accelerator, model, task, splits, run, "validation", None)]
    lengths = task.encode(splits["train"], model.processor, config.seed, run.data.max_length).lengths
    plan = make_step_plan(accelerator, run, len(splits["train"]), None)
    recorder = Recorder(accelerator, run, get_run_folder(run), plan.total, None)
    # training time includes cached features, as if this run had computed them
    cached = [view for views in features.values() for view in views if view.from_cache]
    recorder.started = started - sum(view.seconds for view in cached)
    with recorder, StopSignal(accelerator) as stop:
        search = _HeadSearch(head, task, run, plan, features, lengths, accelerator.device, stop)
        result = run_on_main(accelerator, search.train, get_run_folder(run))
        for values in result.records:
            recorder.history.steps = values.pop("step")
            recorder.log(values, unlogged_metrics(values, task, search.metric))
        run_on_main(accelerator, recorder.flush)
        recorder.history.steps = result.steps
        recorder.history.best = result.best
        run_on_main(accelerator, lambda: write_text(get_run_folder(run) / HEADS, json.dumps(result.table, indent=2)))
        if stop.any_received():
            raise _stopped(stop, result.steps, plan)
    model.to(accelerator.device)
    broadcast(accelerator, dict(head.named_parameters()), {"weight": result.weight, "bias": result.bias})
    return recorder.history


def _features(
    accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig, split: str, view: int | None
) -> Features:
    return compute_features(accelerator, model, task, splits[split], run, split=split, view=view)


def _stopped(stop: StopSignal, steps: int, plan: StepPlan) -> Stopped:
    return Stopped(
        f"stopped ({stop.reason or 'signal to another process'}) after step {steps} of {plan.total} of the head; the "
        "features are cached. Run the same command with --resume auto to train the head again."
    )


@dataclass
class _Result:
    """Result of the head search, sent from the main process to all."""

    steps: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))


class _HeadSearch:
    """Parallel training and selection of heads, on one process.

    Args:
        head: Linear head of the model, which initializes all heads.
        task: Computes loss and metrics.
        run: Uses `train` and `adapt.frozen`.
        plan: Steps and evaluations.
        features: Cached features by split; train has one entry per augmented view.
        lengths: Tokens per training row, if rows are grouped by length.
        device: Device of the heads.
        stop: Checked after every step.
    """

    def __init__(
        self,
        head: nn.Linear,
        task: Task,
        run: RunConfig,
        plan: StepPlan,
        features: dict[str, list[Features]],
        lengths: np.ndarray | None,
        device: torch.device,
        stop: StopSignal,
    ) -> None:
        self.task, self.run, self.plan, self.device, self.stop = task, run, plan, device, stop
        self.scale = scale_of(head)
        self.views = [view.values for view in features["train"]]
        self.labels = torch.from_numpy(np.array(features["train"][0].labels))
        self.lengths = lengths
        self.held_out = features.get("validation", [None])[0]
        if self.held_out is not None:
            values, labels = self.held_out.values, self.held_out.labels
            self.validation = [torch.from_numpy(np.array(array)).to(device) for array in (values, labels)]
        settings = head_settings(run, has_validation=self.held_out is not None)
        self.heads = BatchedHeads(head, settings, run.train.max_grad_norm, device)
        self.metric = run.train.metric_for_best_model or task.best_metric
        rows = 0 if self.held_out is None else len(self.held_out.values)
        self.best = [BestMetric(task, self.metric, rows) for _ in settings]
        self.selected: list[dict[str, Any]] = [{} for _ in settings]
        """Step, metrics and weights of the best evaluation per head."""
        self.curves: list[list[dict[str, Any]]] = [[] for _ in settings]

    def train(self) -> _Result:
        """Trains until the last step or early stopping, and returns the head selected on validation."""
        config, plan, heads = self.run.train, self.plan, self.heads
        log(f"train: {len(heads.settings)} head(s) in parallel on cached features of {len(self.labels):,} rows")
        sums, count = torch.zeros(len(heads.settings), device=self.device), 0
        warmup = math.ceil(config.warmup_ratio * plan.total)
        for epoch, rows in self._steps():
            factor = lr_factor(heads.steps, config.lr_scheduler_type, plan.total, warmup)
            view = self.views[epoch % len(self.views)]
            rows, weights = _padded(rows)
            features = torch.from_numpy(view[rows]).to(self.device)
            labels = self.labels[rows].to(self.device)

            def losses(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return self._losses(logits, labels)

            sums += heads.step(features, weights.to(self.device), losses, factor)
            count += 1
            if not bool(heads.alive.any()):
                raise NonfiniteError(
                    f"step {heads.steps}: no head has a finite loss (train.head_lr "
                    f"{', '.join(f'{setting.lr:.3g}' for setting in heads.settings)}). Set a lower train.head_lr."
                )
            if heads.steps % config.logging_steps == 0 or self._due:
                self._record(sums / count, epoch, factor)
                sums, count = torch.zeros_like(sums), 0
            if self._due and self._evaluate():
                break
            if self.stop.received:
                raise _stopped(self.stop, heads.steps, plan)
        return self._finish()

    def _steps(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields the epoch and the row numbers per seed for each step, in the order of `fit`."""
        step_rows = self.plan.share.effective_batch
        share = Share(0, 1, step_rows, 1, step_rows)
        for epoch in range(-(-self.plan.total // self.plan.epoch_steps)):
            orders = [train_batches(len(self.labels), self.lengths, share, seed, epoch) for seed in self.heads.seeds]
            for _ in range(min(self.plan.epoch_steps, self.plan.total - epoch * self.plan.epoch_steps)):
                yield epoch, [np.array([row for _, row, _ in next(order)]) for order in orders]

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns losses [H, B] of logits [H, B, K] and labels [S, B, …] per seed."""
        heads, rows = logits.shape[:2]
        labels = labels.repeat_interleave(heads // len(labels), 0)
        batch = {"labels": labels.flatten(0, 1)}
        outputs = {"logits": self._in_target_units(logits.flatten(0, 1))}
        return self.task.loss(outputs, batch).unflatten(0, (heads, rows))

    def _in_target_units(self, outputs: Tensor) -> Tensor:
        """Returns head outputs [..., K] with the target scaling of the model applied."""
        return outputs if self.scale is None else self.scale.apply(outputs)

    @property
    def _due(self) -> bool:
        step = self.heads.steps
        return step == self.plan.total or self.held_out is not None and step % self.plan.eval_steps == 0

    def _record(self, losses: Tensor, epoch: int, factor: float) -> None:
        step = self.heads.steps
        for curve, setting, loss in zip(self.curves, self.heads.settings, losses.tolist(), strict=True):
            record = {"step": step, "epoch": step / self.plan.epoch_steps, "train/loss": loss}
            curve.append(record | {"lr/head": setting.lr * factor})

    def _evaluate(self) -> bool:
        """Evaluates every head on validation and updates the selection; returns whether to stop early."""
        if self.held_out is None:
            return False
        values, labels = self.validation
        for index in range(len(self.heads.settings)):
            weight, bias = self.heads.copy_of(index)
            metrics = self._measure(self._in_target_units(values @ weight.T + bias), labels)
            self.curves[index].append(
                {"step": self.heads.steps} | {f"validation/{name}": value for name, value in metrics.items()}
            )
            usable = math.isfinite(metrics["loss"]) and bool(self.heads.alive[index])
            if self.best[index].offer(metrics[self.metric] if usable else math.nan):
                self.selected[index] = {"step": self.heads.steps, "metrics": metrics, "weight": weight, "bias": bias}
        patience = self.run.train.early_stopping_patience
        end_early = patience is not None and min(best.since for best in self.best) >= patience
        value = self.selected[self._select()]["metrics"][self.metric]
        log(f"train: step {self.heads.steps}/{self.plan.total}, best head: validation/{self.metric} {value:.4f}")
        if end_early:
            log(f"train: stopped early; {self.metric} of all heads has not improved in {patience} evaluations")
        return end_early

    def _measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        loss = MeanLoss()
        metrics = all_metrics(self.task.metrics(), self.run.train.metrics)
        outputs, batch = {"logits": logits}, {"labels": labels}
        loss.update_losses(self.task.loss(outputs, batch))
        for metric in metrics:
            metric.update(outputs, batch)
        return {name: value for metric in (loss, *metrics) for name, value in metric.compute().items()}

    def _select(self) -> int:
        """Returns the index of the head closest to the default setting within one standard error of the best.

        The best of many heads on few rows is partly due to chance, so a difference within one standard error does not
        justify another setting (one-standard-error rule, as for weights in `BestMetric`; measured in RESULTS.md).
        Distance is the ratio of learning rates, then the difference of weight decay, then the loss.
        """
        evaluated = [index for index, selected in enumerate(self.selected) if selected]
        if not evaluated:
            raise NonfiniteError("validation: no head has a finite loss. Set a lower train.head_lr.")
        values = {index: self.best[index].sign * self.selected[index]["metrics"][self.metric] for index in evaluated}
        top = max(evaluated, key=values.__getitem__)
        close = [index for index in evaluated if values[index] >= values[top] - self.best[top].error]
        default = self.run.train

        def distance(index: int) -> tuple[float, float, float]:
            setting = self.heads.settings[index]
            ratio = abs(math.log(setting.lr / default.head_lr)) if setting.lr and default.head_lr else 0.0
            loss = self.selected[index]["metrics"]["loss"]
            return ratio, abs(setting.weight_decay - default.weight_decay), loss

        return min(close, key=distance)

    def _finish(self) -> _Result:
        heads = self.heads
        if self.held_out is None:
            weight, bias = heads.copy_of(0)
            return _Result(heads.steps, self.curves[0], {}, [], weight, bias)
        index = self._select()
        selected, setting = self.selected[index], heads.settings[index]
        value = selected["metrics"][self.metric]
        best = {"step": selected["step"], "metric": f"validation/{self.metric}", "value": value}
        table = [
            asdict(setting) | {"kept": each is selected, "step": each.get("step"), **finite(each.get("metrics", {}))}
            for setting, each in zip(heads.settings, self.selected, strict=True)
        ]
        log(
            f"train: selected head {index + 1} of {len(heads.settings)} (lr {setting.lr:.3g}, weight decay "
            f"{setting.weight_decay:g}, seed {setting.seed}) at step {best['step']}, {best['metric']} {value:.4f}"
        )
        return _Result(heads.steps, self.curves[index], best, table, selected["weight"], selected["bias"])


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, Tensor]:
    """Returns padded row numbers [S, B] and their weights, since steps of different seeds may differ by a row."""
    longest = max(len(each) for each in rows)
    weights = torch.zeros(len(rows), longest)
    for index, each in enumerate(rows):
        weights[index, : len(each)] = 1 / len(each)
    return np.stack([np.pad(each, (0, longest - len(each)), mode="edge") for each in rows]), weights


def head_settings(run: RunConfig, has_validation: bool) -> list[HeadSetting]:
    """Returns the settings of the heads to train, grouped by seed; only the default one without validation."""
    config, frozen = run.train, run.adapt.frozen
    default = HeadSetting(config.head_lr or 0.0, config.weight_decay, config.seed)
    if not has_validation:
        return [default]
    decays = frozen.weight_decays
    weight_decays: Sequence[float] = [config.weight_decay, 0.0, 0.1] if decays is None else decays
    return [
        HeadSetting(default.lr * factor, decay, config.seed + seed)
        for seed in range(frozen.num_seeds)
        for decay in dict.fromkeys(weight_decays)
        for factor in dict.fromkeys(frozen.lr_factors)
    ]
