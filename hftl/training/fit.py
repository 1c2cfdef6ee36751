"""The loop. A *step* is one optimizer update; it has `gradient_accumulation_steps` micro-batches on each process."""

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
from hftl.training.probe import fit_probe
from hftl.training.signals import StopSignal
from hftl.training.sync import all_reduce_sum, raise_if_nonfinite, scaler_backs_off
from hftl.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


@row_advice(ROW_ADVICE, RESUME_ADVICE)
def fit(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Trains the parameters of `model` that `adapt` chose, and leaves it with the best weights on validation, if any.

    The loss of a step is the mean over all rows of its effective batch, whatever batch size, accumulation and
    number of processes it is made of, so (batch, accumulation, processes) with an equal product give the same gradient
    where no dropout and no batch statistics are in it.

    A training that was stopped and goes on (`run.resume`) is, on a CPU and as many processes, bit for bit the one that
    was not stopped; on another number of processes the rows of each step are the same and rounding differs.

    Args:
        accelerator: From `start`.
        model: From `build_model` and `adapt`; changed in place.
        task: Says how rows become inputs, and the loss of each.
        splits: `train`, and `validation` where there is one.
        run: Resolved by `prepare`.

    Returns:
        Losses, learning rates and metrics by step.

    Raises:
        RowError: A row cannot be read; a checkpoint of the steps before has been saved, except under DDP.
        NonfiniteError: Loss or gradient is NaN or infinite; the state before that step has been saved.
        Stopped: A signal asked for it; the state has been saved.
        CheckpointError: The state cannot be written, or belongs to another run.
        HftlError: A single row does not fit into memory.
    """
    from accelerate.utils import set_seed

    if run.adapt.method == "probe":
        return fit_probe(accelerator, model, task, splits, run)
    if uses_cached_features(model, task, splits, run):
        return fit_heads(accelerator, model, task, splits, run)
    config, folder = run.train, get_run_folder(run)
    rows, held_out = training_rows(accelerator, model, task, splits, run)

    keeper = Checkpointer(accelerator, run, folder)
    earlier = keeper.find() if run.resume == "auto" else None
    plan = make_step_plan(accelerator, run, len(rows), earlier)
    same = run_identity(model, splits["train"], plan.share.effective_batch, plan.total, earlier)
    model.to(accelerator.device)
    optimizer = make_optimizer(model, config, accelerator.device)
    limit = MicroBatchLimit(
        "training", enabled=config.on_oom == "halve", whole=getattr(task, "depends_on_batch", False)
    )
    gradient = StepGradient(accelerator, model, task, limit)
    stepper = accelerator.prepare_optimizer(optimizer)
    best = BestCheckpoint(
        accelerator, model, folder, task, config.metric_for_best_model or task.best_metric, len(held_out or ())
    )
    recorder = Recorder(accelerator, run, folder, plan.total, earlier and earlier["recorder"])
    history = recorder.history
    validation = Validation(accelerator, model, task, held_out, run, best, recorder, plan.eval_steps, plan.total)
    training = Training(accelerator, model, optimizer, best, recorder, limit, same)
    keeper.check_room(training)

    # from here on, dropout differs between processes
    set_seed((config.seed + history.steps) % 2**32, device_specific=True)
    eval_pending = finished = due = False
    if earlier:
        keeper.load(training, earlier)
        eval_pending, finished = earlier["eval_pending"], earlier["finished"]
    left = range(history.steps, history.steps if finished else plan.total)
    model.train()
    source = _loader(accelerator, rows, task, run, plan.share, left)
    with keeper, recorder, StopSignal(accelerator) as stop, source as batches:
        micro_batches = iter(batches)
        while not finished:
            try:
                over = eval_pending and validation(stop.agreed)
            except Interrupted:
                keeper.save(training, eval_pending=True, wait=True)
                raise _stopped(stop, history, plan) from None
            except RowError as error:  # the same one on all processes
                keeper.save(training, eval_pending=True, wait=True)
                raise _resumable(error, history) from error
            finished = over or history.steps == plan.total
            if finished or due:
                keeper.save(training, finished=finished, wait=finished)
            if finished:
                break

            rates = set_rates(optimizer, config, history.steps, plan.total)
            done = gradient(micro_batches, plan.share.accumulation)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf) or 0.0)
            asks = stop.asked, keeper.due, keeper.failed(training), done.problem is not None
            loss, asked, due, failed, unusable = all_reduce_sum(accelerator, done.total, *asks)
            if unusable:
                gradient.undo()
                keeper.save(training, wait=True)
                raise _resumable(shared_row_error([done.problem] if done.problem else []), history)
            usable = math.isfinite(loss) and math.isfinite(norm)
            if usable or scaler_backs_off(accelerator, loss):
                stepper.step()  # of a gradient that is not finite, fp16's scaler takes a smaller loss scale
                stepper.zero_grad()
            else:
                gradient.undo()
                if config.on_nonfinite == "stop" or history.skipped >= config.max_nonfinite_steps:
                    saved = keeper.save_good(training)
                    raise_if_nonfinite(accelerator, done, loss, norm, history.steps + 1, rates, saved)
                if accelerator.scaler is not None:
                    accelerator.scaler.update()  # it has looked at this gradient and wants to be done with it
                history.skipped += 1
            recorder.advance(loss if usable else None)

            eval_pending, step = validation.due, history.steps
            if step % config.logging_steps == 0 or eval_pending or step == plan.total or not usable:
                record = {"epoch": step / plan.epoch_steps, "train/loss": recorder.mean_loss() if usable else loss}
                record |= {"grad_norm": norm} | {f"lr/{part}": rate for part, rate in rates.items()}
                recorder.log(record | ({} if usable else {"skipped_steps": history.skipped}))
            if failed:
                keeper.flush(training)
            if asked:
                keeper.save(training, eval_pending=eval_pending, wait=True)
                raise _stopped(stop, history, plan)
            due = bool(due) or step % (run.checkpoint.save_steps or plan.total) == 0
        if stop.agreed():  # during the last evaluation, or while saving
            raise _stopped(stop, history, plan)

    best.share_buffers()
    best.restore()
    accelerator.free_memory()
    if history.best:
        log("fit: kept the weights of step {step} ({metric} {value:.4f})".format(**history.best))
    return history


def _stopped(stop: StopSignal, history: History, plan: StepPlan) -> Stopped:
    return Stopped(
        f"stopped ({stop.reason or 'as another process was asked to'}) after step {history.steps} of {plan.total}; the "
        "state is in the run folder. The same command with --resume auto goes on from there."
    )


def _resumable(error: RowError | None, history: History) -> RowError:
    assert error is not None, "some process has met such a row"
    return error.with_advice(ROW_ADVICE, f"The checkpoint after step {history.steps} is saved.", RESUME_ADVICE)


def _loader(
    accelerator: Accelerator, rows: Examples, task: Task, run: RunConfig, share: Share, steps: range
) -> Batches:
    """Returns this process's micro-batches of some steps, on the host: a step may have to take them twice."""
    device, workers = accelerator.device.type, run.data.num_workers
    workers = default_workers(task.modality, device, share.world) if workers is None else workers

    def stream() -> Iterator[list[Key]]:
        return step_batches(len(rows), rows.lengths, share, run.train.seed, steps)

    return make_loader(rows, stream, task.collate, device=device, num_workers=workers, timeout=run.data.worker_timeout)
