"""Training of a head alone: on features that were computed once, many settings at a time, validation chooses."""

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
"""In the run folder: every head that was tried, and what it reached on validation."""


def fit_heads(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Trains the head of a frozen `model` on cached features, and leaves it with the best one on validation.

    Every head sees the rows in the order and the steps in which `fit` would show them, so that one head alone ends
    where `fit` without the cache does (to rounding). There are no states to go on from: a run that is stopped begins
    the heads again, which costs seconds, on features that are there.

    Args:
        accelerator: From `start`. Heads are trained by the main process; features by all.
        model: From `build_model` and `adapt`; its head is changed in place.
        task: Says the loss of each row.
        splits: `train`, and `validation` where there is one; without, only the plain setting is trained.
        run: `adapt.frozen` says what is tried.

    Returns:
        Losses, rates and metrics of the head that was kept, by step; all heads are in heads.json.

    Raises:
        FeatureError: Features cannot be computed or kept.
        NonfiniteError: No head is left whose loss is a number.
        Stopped: A signal asked for it.
    """
    config, frozen, began = run.train, run.adapt.frozen, time.perf_counter()
    head = linear_head(model)
    assert head is not None
    views = range(frozen.num_views) if task.modality == "image" and frozen.num_views else [None]
    if views == [None] and task.modality == "image" and run.data.augment.any:
        log("adapt: frozen, without augmentation (--adapt.frozen.num_views N trains on N augmented views per image)")
    if frozen.num_views and task.modality != "image":
        log("adapt: adapt.frozen.num_views is for images; it has no effect here")
    of_split = {"train": [_features(accelerator, model, task, splits, run, "train", view) for view in views]}
    if "validation" in splits:
        of_split["validation"] = [_features(accelerator, model, task, splits, run, "validation", None)]
    lengths = task.encode(splits["train"], model.processor, config.seed, run.data.max_length).lengths
    plan = make_step_plan(accelerator, run, len(splits["train"]), None)
    recorder = Recorder(accelerator, run, get_run_folder(run), plan.total, None)
    # the features are what such a training costs, whether this run computed them or another one
    recorder.started = began - sum(part.seconds for parts in of_split.values() for part in parts if part.from_cache)
    with recorder, StopSignal(accelerator) as stop:
        trial = _Trial(head, task, run, plan, of_split, lengths, accelerator.device, stop)
        done = run_on_main(accelerator, trial.train, get_run_folder(run))
        for values in done.records:
            recorder.history.steps = values.pop("step")
            recorder.log(values, unlogged_metrics(values, task, trial.metric))
        run_on_main(accelerator, recorder.flush)
        recorder.history.steps = done.steps
        recorder.history.best = done.best
        run_on_main(accelerator, lambda: write_text(get_run_folder(run) / HEADS, json.dumps(done.table, indent=2)))
        if stop.any_received():
            raise _stopped(stop, done.steps, plan)
    kept = {"weight": done.weight, "bias": done.bias}
    model.to(accelerator.device)
    broadcast(accelerator, dict(head.named_parameters()), kept)
    return recorder.history


def _features(
    accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig, split: str, view: int | None
) -> Features:
    return compute_features(accelerator, model, task, splits[split], run, split=split, view=view)


def _stopped(stop: StopSignal, steps: int, plan: StepPlan) -> Stopped:
    return Stopped(
        f"stopped ({stop.reason or 'as another process was asked to'}) after step {steps} of {plan.total} of the head. "
        "The features are kept; the same command with --resume auto begins the head again."
    )


@dataclass
class _Done:
    """What the main process sends to all."""

    steps: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))


class _Trial:
    """All heads of a run, on one process."""

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
        self.views = [part.values for part in features["train"]]
        self.labels = torch.from_numpy(np.array(features["train"][0].labels))
        self.lengths = lengths
        self.held_out = features.get("validation", [None])[0]
        if self.held_out is not None:
            values, labels = self.held_out.values, self.held_out.labels
            self.validation = [torch.from_numpy(np.array(part)).to(device) for part in (values, labels)]
        settings = head_settings(run, choosing=self.held_out is not None)
        self.bank = BatchedHeads(head, settings, run.train.max_grad_norm, device)
        self.metric = run.train.metric_for_best_model or task.best_metric
        rows = 0 if self.held_out is None else len(self.held_out.values)
        self.best = [BestMetric(task, self.metric, rows) for _ in settings]
        self.kept: list[dict[str, Any]] = [{} for _ in settings]
        self.curves: list[list[dict[str, Any]]] = [[] for _ in settings]

    def train(self) -> _Done:
        """Trains until the plan ends, or patience does, and returns the head that validation prefers."""
        config, plan, bank = self.run.train, self.plan, self.bank
        log(f"fit: {len(bank.settings)} head(s) side by side on {len(self.labels):,} rows of features")
        sums, count = torch.zeros(len(bank.settings), device=self.device), 0
        warmup = math.ceil(config.warmup_ratio * plan.total)
        for epoch, rows in self._steps():
            factor = lr_factor(bank.steps, config.lr_scheduler_type, plan.total, warmup)
            view = self.views[epoch % len(self.views)]
            rows, weights = _filled_up(rows)
            features = torch.from_numpy(view[rows]).to(self.device)
            labels = self.labels[rows].to(self.device)

            def losses(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return self._losses(logits, labels)

            sums += bank.step(features, weights.to(self.device), losses, factor)
            count += 1
            if not bool(bank.alive.any()):
                raise NonfiniteError(
                    f"step {bank.steps}: no head is left whose loss is a number (head_lr "
                    f"{', '.join(f'{setting.lr:.3g}' for setting in bank.settings)}); lower train.head_lr."
                )
            if bank.steps % config.logging_steps == 0 or self._due:
                self._note(sums / count, epoch, factor)
                sums, count = torch.zeros_like(sums), 0
            if self._due and self._evaluate():
                break
            if self.stop.received:
                raise _stopped(self.stop, bank.steps, plan)
        return self._finish()

    def _steps(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields the epoch and the rows of each step, for each seed; as `fit` would take them."""
        step_rows = self.plan.share.effective_batch
        share = Share(0, 1, step_rows, 1, step_rows)
        for epoch in range(-(-self.plan.total // self.plan.epoch_steps)):
            orders = [train_batches(len(self.labels), self.lengths, share, seed, epoch) for seed in self.bank.seeds]
            for _ in range(min(self.plan.epoch_steps, self.plan.total - epoch * self.plan.epoch_steps)):
                yield epoch, [np.array([row for _, row, _ in next(order)]) for order in orders]

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns [H, B] from logits [H, B, K] and the labels of each seed's rows, [S, B, …]."""
        heads, rows = logits.shape[:2]
        of_each = labels.repeat_interleave(heads // len(labels), 0)
        batch = {"labels": of_each.flatten(0, 1)}
        return self.task.loss({"logits": self._in_units(logits.flatten(0, 1))}, batch).unflatten(0, (heads, rows))

    def _in_units(self, outputs: Tensor) -> Tensor:
        """Returns outputs [..., K] of a head as the network would give them."""
        return outputs if self.scale is None else self.scale.apply(outputs)

    @property
    def _due(self) -> bool:
        step = self.bank.steps
        return step == self.plan.total or self.held_out is not None and step % self.plan.eval_steps == 0

    def _note(self, losses: Tensor, epoch: int, factor: float) -> None:
        step = self.bank.steps
        for curve, setting, loss in zip(self.curves, self.bank.settings, losses.tolist(), strict=True):
            record = {"step": step, "epoch": step / self.plan.epoch_steps, "train/loss": loss}
            curve.append(record | {"lr/head": setting.lr * factor})

    def _evaluate(self) -> bool:
        """Measures every head on validation and keeps what is best; returns whether patience is over."""
        if self.held_out is None:
            return False
        values, labels = self.validation
        for number in range(len(self.bank.settings)):
            weight, bias = self.bank.copy_of(number)
            found = self._measure(self._in_units(values @ weight.T + bias), labels)
            self.curves[number].append(
                {"step": self.bank.steps} | {f"validation/{name}": value for name, value in found.items()}
            )
            fine = math.isfinite(found["loss"]) and bool(self.bank.alive[number])
            if self.best[number].offer(found[self.metric] if fine else math.nan):
                self.kept[number] = {"step": self.bank.steps, "found": found, "weight": weight, "bias": bias}
        patience = self.run.train.early_stopping_patience
        over = patience is not None and min(best.since for best in self.best) >= patience
        number = self._choice()
        value = self.kept[number]["found"][self.metric]
        log(f"step {self.bank.steps}/{self.plan.total} best head so far: validation/{self.metric} {value:.4f}")
        if over:
            log(f"fit: stopped, no better {self.metric} in {patience} evaluations of any head")
        return over

    def _measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        loss = MeanLoss()
        metrics = all_metrics(self.task.metrics(), self.run.train.metrics)
        outputs, batch = {"logits": logits}, {"labels": labels}
        loss.update_losses(self.task.loss(outputs, batch))
        for metric in metrics:
            metric.update(outputs, batch)
        return {name: value for metric in (loss, *metrics) for name, value in metric.compute().items()}

    def _choice(self) -> int:
        """Returns the head to keep: of those within one standard error of the best, the one nearest the plain setting.

        Of so many heads on so few rows the best owes its value partly to luck: what is not clearly better is no
        reason to leave the rate that was asked for (the one-standard-error rule, as for weights in `BestMetric`; what
        it does is in RESULTS.md). Nearest is by the ratio of rates, then by the weight decay, then by the loss.
        """
        tried = [number for number, kept in enumerate(self.kept) if kept]
        if not tried:
            raise NonfiniteError("validation: no head computes a loss that is a number; lower train.head_lr.")
        values = {number: self.best[number].sign * self.kept[number]["found"][self.metric] for number in tried}
        top = max(tried, key=values.__getitem__)
        close = [number for number in tried if values[number] >= values[top] - self.best[top].error]
        plain = self.run.train

        def distance(number: int) -> tuple[float, float, float]:
            setting = self.bank.settings[number]
            ratio = abs(math.log(setting.lr / plain.head_lr)) if setting.lr and plain.head_lr else 0.0
            return ratio, abs(setting.weight_decay - plain.weight_decay), self.kept[number]["found"]["loss"]

        return min(close, key=distance)

    def _finish(self) -> _Done:
        bank = self.bank
        if self.held_out is None:
            weight, bias = bank.copy_of(0)
            return _Done(bank.steps, self.curves[0], {}, [], weight, bias)
        number = self._choice()
        kept, setting = self.kept[number], bank.settings[number]
        best = {"step": kept["step"], "metric": f"validation/{self.metric}", "value": kept["found"][self.metric]}
        table = [
            asdict(setting) | {"kept": each is kept, "step": each.get("step"), **finite(each.get("found", {}))}
            for setting, each in zip(bank.settings, self.kept, strict=True)
        ]
        log(
            f"fit: kept head {number + 1} of {len(bank.settings)} (lr {setting.lr:.3g}, weight decay "
            f"{setting.weight_decay:g}, seed {setting.seed}) at step {kept['step']}, {best['metric']} "
            f"{best['value']:.4f}"
        )
        return _Done(bank.steps, self.curves[number], best, table, kept["weight"], kept["bias"])


def _filled_up(rows: list[np.ndarray]) -> tuple[np.ndarray, Tensor]:
    """Returns row numbers [S, B] and their weights: steps of different orders may differ by a row."""
    longest = max(len(each) for each in rows)
    weights = torch.zeros(len(rows), longest)
    for number, each in enumerate(rows):
        weights[number, : len(each)] = 1 / len(each)
    return np.stack([np.pad(each, (0, longest - len(each)), mode="edge") for each in rows]), weights


def head_settings(run: RunConfig, choosing: bool) -> list[HeadSetting]:
    """Returns the settings of the heads to train, those of a seed together; one only where nothing can choose."""
    config, frozen = run.train, run.adapt.frozen
    plain = HeadSetting(config.head_lr or 0.0, config.weight_decay, config.seed)
    if not choosing:
        return [plain]
    decays = frozen.weight_decays
    tried: Sequence[float] = [config.weight_decay, 0.0, 0.1] if decays is None else decays
    return [
        HeadSetting(plain.lr * factor, decay, config.seed + seed)
        for seed in range(frozen.num_seeds)
        for decay in dict.fromkeys(tried)
        for factor in dict.fromkeys(frozen.lr_factors)
    ]
