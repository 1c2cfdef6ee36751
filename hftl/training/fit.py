"""Training loop. A *step* is one optimizer update of `gradient_accumulation_steps` micro-batches per process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.distributed import shared_row_error
from hftl.errors import RESUME_ADVICE, ROW_ADVICE, RowError, Stopped, row_advice
from hftl.evaluation.evaluate import Interrupted
from hftl.loading.loader import Examples, Key, Share, default_workers, make_loader, step_batches
from hftl.loading.step_plan import StepPlan, make_step_plan
from hftl.loading.workers import Batches
from hftl.logging import log
from hftl.models.oom_retry import MicroBatchLimit
from hftl.models.task_model import TaskModel
from hftl.run_folder.folder import get_run_folder
from hftl.run_folder.history import History, Recorder
from hftl.tasks.task import Task
from hftl.training.best_checkpoint import BestCheckpoint
from hftl.training.checkpointer import Checkpointer, Training, run_identity
from hftl.training.feature_cache_policy import training_rows, uses_cached_features
from hftl.training.gradient_accumulation import StepGradient
from hftl.training.head_search import fit_heads
from hftl.training.optim import make_optimizer, set_rates
from hftl.training.optimizer_step import OptimizerStep
from hftl.training.probe import fit_probe
from hftl.training.signals import StopSignal
from hftl.training.sync import all_reduce_sum
from hftl.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


@row_advice(ROW_ADVICE, RESUME_ADVICE)
def fit(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Trains the parameters selected by `adapt` and restores the best checkpoint on validation, if any.

    The loss of a step is the mean over all rows of its effective batch. Without dropout and batch statistics, every
    (batch size, accumulation, processes) with the same product therefore gives the same gradient.

    A resumed run (`run.resume`) is bitwise identical to an uninterrupted one on a CPU with as many processes. With
    another number of processes, steps have the same rows and differ by rounding.

    Args:
        accelerator: From `create_accelerator`.
        model: From `build_model` and `adapt`; changed in place.
        task: Encodes rows and computes the loss per row.
        splits: `train`, and `validation` if it exists.
        run: Resolved by `setup_run`.

    Returns:
        Losses, learning rates and metrics by step.

    Raises:
        RowError: A row cannot be read; except under DDP, a checkpoint of the steps before is saved.
        NonfiniteError: Loss or gradient is NaN or infinite; a checkpoint of the steps before is saved.
        Stopped: A stop signal was received; a checkpoint is saved.
        CheckpointError: The checkpoint cannot be written, or belongs to another run.
        HftlError: A single row does not fit into memory.
    """
    from accelerate.utils import set_seed

    if run.adapt.method == "probe":
        return fit_probe(accelerator, model, task, splits, run)
    if uses_cached_features(model, task, splits, run):
        return fit_heads(accelerator, model, task, splits, run)
    config, folder = run.train, get_run_folder(run)
    rows, validation_rows = training_rows(accelerator, model, task, splits, run)

    checkpointer = Checkpointer(accelerator, run, folder)
    saved = checkpointer.find() if run.resume == "auto" else None
    plan = make_step_plan(accelerator, run, len(rows), saved)
    identity = run_identity(model, splits["train"], plan.share.effective_batch, plan.total, saved)
    model.to(accelerator.device)
    optimizer = make_optimizer(model, config, accelerator.device)
    whole = getattr(task, "depends_on_batch", False)
    limit = MicroBatchLimit("training", enabled=config.on_oom == "halve", whole=whole)
    gradient = StepGradient(accelerator, model, task, limit)
    metric = config.metric_for_best_model or task.best_metric
    best = BestCheckpoint(accelerator, model, folder, task, metric, len(validation_rows or ()))
    recorder = Recorder(accelerator, run, folder, plan.total, saved and saved["recorder"])
    history = recorder.history
    validation = Validation(accelerator, model, task, validation_rows, run, best, recorder, plan.eval_steps, plan.total)
    training = Training(accelerator, model, optimizer, best, recorder, limit, identity)
    optimizer_step = OptimizerStep(accelerator, optimizer, gradient, checkpointer, training, config)
    checkpointer.check_disk_space(training)

    # from here on, dropout differs between processes
    set_seed((config.seed + history.steps) % 2**32, device_specific=True)
    eval_pending, finished = checkpointer.load(training, saved) if saved else (False, False)
    save_due = False
    steps = range(history.steps, history.steps if finished else plan.total)
    model.train()
    loader = _loader(accelerator, rows, task, run, plan.share, steps)
    with checkpointer, recorder, StopSignal(accelerator) as stop, loader as batches:
        micro_batches = iter(batches)
        while not finished:
            end_early = eval_pending and _evaluate(validation, checkpointer, training, stop, plan)
            finished = end_early or history.steps == plan.total
            if finished or save_due:
                checkpointer.save(training, finished=finished, wait=finished)
            if finished:
                break

            rates = set_rates(optimizer, config, history.steps, plan.total)
            local = gradient(micro_batches, plan.share.accumulation)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf) or 0.0)
            flags = stop.received, checkpointer.due, checkpointer.failed(training), local.problem is not None
            loss, stop_received, save_due, failed, row_failed = all_reduce_sum(accelerator, local.total, *flags)
            if row_failed:
                gradient.undo()
                checkpointer.save(training, wait=True)
                raise _resumable(shared_row_error([local.problem] if local.problem else []), history)
            updated = optimizer_step(local, loss, norm, rates)
            recorder.advance(loss if updated else None)

            eval_pending, step = validation.due, history.steps
            if step % config.logging_steps == 0 or eval_pending or step == plan.total or not updated:
                recorder.log_step(step / plan.epoch_steps, None if updated else loss, norm, rates)
            if failed:
                checkpointer.flush(training)
            if stop_received:
                checkpointer.save(training, eval_pending=eval_pending, wait=True)
                raise _stopped(stop, history, plan)
            save_due = bool(save_due) or step % (run.checkpoint.save_steps or plan.total) == 0
        if stop.any_received():  # during the last evaluation, or while saving
            raise _stopped(stop, history, plan)

    best.share_buffers()
    best.restore()
    accelerator.free_memory()
    if history.best:
        log("train: restored best checkpoint: step {step}, {metric} {value:.4f}".format(**history.best))
    return history


def _evaluate(
    validation: Validation, checkpointer: Checkpointer, training: Training, stop: StopSignal, plan: StepPlan
) -> bool:
    """Returns whether training should end early; saves a checkpoint if the evaluation is interrupted."""
    history = training.recorder.history
    try:
        return validation(stop.any_received)
    except Interrupted:
        checkpointer.save(training, eval_pending=True, wait=True)
        raise _stopped(stop, history, plan) from None
    except RowError as error:  # the same one on all processes
        checkpointer.save(training, eval_pending=True, wait=True)
        raise _resumable(error, history) from error


def _stopped(stop: StopSignal, history: History, plan: StepPlan) -> Stopped:
    return Stopped(
        f"stopped ({stop.reason or 'signal to another process'}) after step {history.steps} of {plan.total}; the "
        "checkpoint is saved. Run the same command with --resume auto."
    )


def _resumable(error: RowError | None, history: History) -> RowError:
    assert error is not None, "some process has found an invalid row"
    return error.with_advice(ROW_ADVICE, f"The checkpoint after step {history.steps} is saved.", RESUME_ADVICE)


def _loader(
    accelerator: Accelerator, rows: Examples, task: Task, run: RunConfig, share: Share, steps: range
) -> Batches:
    """Returns this process's micro-batches of `steps`, on the host because a retried step reads them again."""
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, share.world) if workers is None else workers

    def keys() -> Iterator[list[Key]]:
        return step_batches(len(rows), rows.lengths, share, run.train.seed, steps)

    return make_loader(rows, keys, task.collate, device=device, num_workers=workers, timeout=run.data.worker_timeout)
