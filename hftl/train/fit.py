"""The loop. A *step* is one optimizer update; it has `gradient_accumulation_steps` micro-batches on each process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from torch import Tensor

from hftl.config.schema import RunConfig
from hftl.console import say
from hftl.data.loader import Key, Rows, Share, default_workers, make_loader, steps_per_epoch, train_batches
from hftl.data.source import Splits
from hftl.errors import HftlError
from hftl.evaluation.evaluate import evaluate_rows
from hftl.models.parts import TaskModel
from hftl.tasks.task import Batch, Task
from hftl.train.checkpoint import BestWeights
from hftl.train.history import History, Recorder
from hftl.train.optim import make_optimizer, make_schedule
from hftl.train.start import run_folder

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Trains the parameters of `model` that `adapt` chose, and leaves it with the best weights on validation, if any.

    The loss of a step is the mean over all rows of its effective batch, whatever batch size, accumulation and
    number of processes it is made of, so (batch, accumulation, processes) with an equal product give the same gradient
    where no dropout and no batch statistics are in it.

    Args:
        accelerator: From `start`.
        model: From `build_model` and `adapt`; changed in place.
        task: Says how rows become inputs, and the loss of each.
        splits: `train`, and `validation` where there is one.
        run: Resolved by `prepare`.

    Returns:
        Losses, learning rates and metrics by step.

    Raises:
        HftlError: The loss is not finite.
    """
    config, max_length = run.train, run.data.max_length
    rows = task.encode(splits["train"], model.processor, config.seed, max_length)
    held_out = task.encode(splits["validation"], model.processor, None, max_length) if "validation" in splits else None

    # plan: everything is counted in steps
    share = Share(
        accelerator.process_index,
        accelerator.num_processes,
        config.batch_size_per_device,
        config.gradient_accumulation_steps,
    )
    epoch_steps = steps_per_epoch(len(rows), share)
    total = config.max_steps or math.ceil(epoch_steps * (config.num_epochs or 1))
    eval_every = config.eval_every or epoch_steps
    say(
        f"fit: {total} steps of {share.effective_batch} rows at most ({share.batch_size} x {share.world} process(es) x "
        f"{share.accumulation}), {epoch_steps} an epoch; evaluation every {eval_every}"
    )

    from accelerate.utils import set_seed

    model.to(accelerator.device)
    optimizer = make_optimizer(model, config, accelerator.device)
    # Accelerate would step a prepared schedule once for each process, so it stays ours
    schedule = make_schedule(optimizer, config, total)
    net, stepper = accelerator.prepare(model, optimizer)
    metric = config.best_metric or task.best_metric
    best = BestWeights(accelerator, model, run_folder(run), larger_is_better=metric != "loss", rows=len(held_out or ()))
    recorder = Recorder(accelerator, run, run_folder(run), total)

    set_seed(config.seed, device_specific=True)  # from here on, dropout differs between processes
    model.train()
    summed, since = 0.0, 0
    for batch in _micro_batches(accelerator, rows, task, run, share, total):
        with accelerator.accumulate(net):
            losses = task.loss(net(batch["inputs"]), batch)
            loss = (losses * batch["weight"]).sum()
            # weights sum to 1 over the step; undo the divisions by DDP (processes) and Accelerate (accumulation)
            accelerator.backward(loss * share.world * share.accumulation)
            norm = (
                accelerator.clip_grad_norm_(net.parameters(), config.max_grad_norm or math.inf)
                if accelerator.sync_gradients
                else None
            )
            stepper.step()
            stepper.zero_grad()
        summed = summed + loss.detach()
        if not accelerator.sync_gradients:
            continue

        lr = {group["name"]: rate for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True)}
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        recorder.advance()
        step, since = recorder.history.steps, since + 1
        evaluates = held_out is not None and (step % eval_every == 0 or step == total)
        if step % config.log_every == 0 or step == total or evaluates:
            mean = float(cast(Tensor, accelerator.reduce(summed, "sum"))) / since
            if not math.isfinite(mean):
                raise HftlError(
                    f"the training loss is {mean} at step {step} (lr {lr}); lower train.lr or look at the data."
                )
            rates = {f"lr/{name}": float(rate) for name, rate in lr.items()}
            recorder.log(**{"epoch": step / epoch_steps, "train/loss": mean, "grad_norm": float(norm or 0.0)}, **rates)
            summed, since = 0.0, 0
        if held_out is not None and evaluates:
            best.share_buffers()
            found = evaluate_rows(accelerator, model, task, held_out, run)
            recorder.log(**{f"validation/{name}": value for name, value in found.items()})
            if best.offer(found[metric]):
                recorder.history.best = {"step": step, "metric": f"validation/{metric}", "value": found[metric]}
            if config.early_stopping_patience and best.since >= config.early_stopping_patience:
                say(f"fit: stopped, no better {metric} in {best.since} evaluations")
                break

    best.restore()
    history = recorder.close()
    accelerator.free_memory()
    if history.best:
        say("fit: kept the weights of step {step} ({metric} {value:.4f})".format(**history.best))
    return history


def _micro_batches(
    accelerator: Accelerator, rows: Rows, task: Task, run: RunConfig, share: Share, total_steps: int
) -> Iterator[Batch]:
    """Yields this process's micro-batches on its device, epoch after epoch, for `total_steps` steps."""
    from accelerate.utils import send_to_device

    device = accelerator.device
    workers = run.data.num_workers
    workers = default_workers(task.modality, device.type, share.world) if workers is None else workers

    def stream() -> Iterator[list[Key]]:
        epochs = (train_batches(len(rows), rows.lengths, share, run.train.seed, epoch) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), total_steps * share.accumulation)

    for batch in make_loader(rows, stream, task.collate, device=device.type, num_workers=workers):
        yield cast(Batch, send_to_device(batch, device, non_blocking=True))
