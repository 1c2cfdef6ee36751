"""Run setup: all checks of configuration, data and model, and the Accelerator of the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hftl.adaptation.apply import method_problem
from hftl.adaptation.lora import find_targets
from hftl.atomic_files import write_text
from hftl.audit.quick_check import quick_check
from hftl.config.allowed_values import value_problems
from hftl.config.defaults import BY_STEPS, resolve
from hftl.config.parse import dump_config
from hftl.config.schema import AugmentConfig, RunConfig
from hftl.data.layouts.in_memory import GIVEN, dataset_from_rows
from hftl.data.splits import Splits
from hftl.data.usable_rows import load_usable_splits
from hftl.data.validation import InvalidRows, records, write_quarantine
from hftl.distributed import group_options, heartbeat_barrier
from hftl.errors import ConfigError, DataError, HftlError, RunComplete, nearest
from hftl.hub_client import name_problem, redact_tokens, repository_problem
from hftl.launcher import build_accelerator, launch_problem
from hftl.logging import is_main_process, log, suppress_logs
from hftl.models.build import build_on_meta, model_name_problem, model_problem, trust_problems
from hftl.models.task_model import HeadSpec
from hftl.renames import renamed_members
from hftl.run.restart import restarts
from hftl.run_folder.folder import (
    MARKER,
    finished_metrics,
    folder_problems,
    get_run_folder,
    make_folder,
    resume_problems,
    resumes,
)
from hftl.tasks.auto_task import AUTO, task_of
from hftl.tasks.capabilities import Capability
from hftl.tasks.metrics import metric_problems
from hftl.tasks.registry import unsupported
from hftl.tasks.task import Task
from hftl.training.probe import probe_problems

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T", bound=Task)
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_HPU")
"""Distributed types of Accelerate in which each process has the whole model."""


def setup_run(
    run: RunConfig, make_task: Callable[[Splits], T] | None = None, rows: Any = None
) -> tuple[RunConfig, Splits, T]:
    """Opens the data, creates the task, and runs all checks that need no device.

    Args:
        run: The configuration before defaults are filled in.
        make_task: Task class, or another function from splits to a task; by default that of `run.task`.
        rows: In-memory rows that replace `run.data.source`, which then only names them: a `DatasetDict`, or a mapping
            of split names to datasets or iterables of rows (see `hftl.data.layouts.in_memory.dataset_from_rows`).

    Returns:
        The configuration with all defaults filled in, the splits, and the task.

    Raises:
        ConfigError: All problems of configuration, data and model, in one message.
    """
    if rows is not None:
        run = replace(run, data=replace(run.data, source=GIVEN + (Path(run.data.source).name or "rows")))
    problems = [*run.problems, *value_problems(run), *filter(None, [launch_problem()])]
    splits, task = None, None
    try:
        make = make_task or cast("Callable[[Splits], T]", task_of(run.task))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    name = getattr(make_task, "name", run.task)
    if run.task not in (AUTO, name):
        problems.append(f"task: '{run.task}' is invalid; this recipe is for {name}. Run the recipe auto for any task.")
    bad: InvalidRows = {}
    if run.data.source and not any(problem.startswith("data.max_") for problem in problems):
        try:
            rows = None if rows is None else dataset_from_rows(rows)  # once, since a stream cannot be read again
            renamed = renamed_members((make,))
            if renamed:
                raise ConfigError(*renamed)
            splits, bad = load_usable_splits(run.data, make, rows, get_run_folder(run), run.train.pair_loss)
            task = make(splits)
            problems += renamed_members((task, *task.metrics()))
            run = replace(run, restarts=restarts(run, bad, rows))
        except HftlError as error:
            problems += error.problems
    model_class = getattr(make, "model_class", None) or (task.head.model_class if task else None)
    model_error = model_name_problem(run.model, model_class) if model_class and run.model.name else None
    if model_error is None and task is not None and run.model.name:
        model_error = model_problem(run.model, task.head)
    problems += trust_problems(run) + _method_problems(run, task)
    if model_error:
        problems.append(model_error)
    elif model_class and run.model.name and not any(problem.startswith(("model.", "adapt.")) for problem in problems):
        head = task.head if task else HeadSpec(model_class, 2)
        problems += _target_problems(run, head) or probe_problems(run, head, splits, task)
    if splits and not resumes(run) and run.adapt.method != "probe":  # a resumed run keeps the rows of its steps
        problems += _batch_problems(run, len(splits["train"]), task)
    problems += _augment_problems(run, task)
    problems += _metric_problems(run, task)
    problems += _tracker_problems(run.train.trackers) + folder_problems(run)
    problems += _hub_problems(run, is_valid=not problems)
    if problems or splits is None or task is None:
        raise ConfigError(*problems)
    # the data is open; trackers and files must not contain credentials
    run = replace(run, task=task.name, data=replace(run.data, source=redact_tokens(run.data.source)))
    resolved = replace(resolve(run, task.modality, getattr(task, "defaults", {})), quarantine=records(bad))
    changed_settings = resume_problems(resolved)
    if changed_settings:
        raise ConfigError(*changed_settings)
    for message in quick_check(splits, task) if is_main_process() else ():
        log(f"check: {message}")
    if unsupported(task, Capability.INTERVALS):
        log(f"report: no confidence intervals for metrics of {task.name}")
    _say_defaults(run, resolved)
    return resolved, splits, task


def create_accelerator(run: RunConfig) -> Accelerator:
    """Creates the Accelerator of a run, sets seeds and creates the run folder.

    Processes, precision and sharding come from the launcher and its configuration file. Rows skipped by `setup_run`
    are written to quarantine.jsonl.

    Raises:
        RunComplete: `run.resume` is auto and the run folder has the finished run.
        ConfigError: Another process is training in the run folder, or the launcher shards the model over devices.
        DataError: Processes skipped different rows.
    """
    import torch
    from accelerate.utils import (
        GradientAccumulationPlugin,
        ProjectConfiguration,
        broadcast_object_list,
        set_seed,
    )

    folder = get_run_folder(run)
    # fit accumulates itself; a plugin, because the launcher's environment overrides an integer
    accumulation = GradientAccumulationPlugin(1, sync_with_dataloader=False)
    accelerator = build_accelerator(
        run.train.num_threads,
        gradient_accumulation_plugin=accumulation,
        log_with=[name for name in run.train.trackers if name] or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[group_options(run.train.timeout_minutes)],
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ConfigError(
            f"accelerate_config.yaml: distributed_type '{accelerator.distributed_type.value}' is not supported; "
            f"allowed: {', '.join(SUPPORTED)}. hftl cannot yet save and verify a model that is sharded over devices."
        )
    finished = finished_metrics(run) if run.resume == "auto" and accelerator.is_main_process else None
    finished = broadcast_object_list([finished])[0] if accelerator.num_processes > 1 else finished
    if finished is not None:
        raise RunComplete(str(folder), finished)
    with heartbeat_barrier("creating the run folder"):
        if accelerator.is_main_process:
            make_folder(folder, run)
            write_text(folder / MARKER, redact_tokens(dump_config(run)))
            write_quarantine(folder, run.quarantine)
    _agree(accelerator, run)
    set_seed(run.train.seed)
    log(
        f"train: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{torch.get_num_threads()} CPU thread(s) each, precision {accelerator.mixed_precision}, run folder {folder}"
    )
    return accelerator


def _agree(accelerator: Accelerator, run: RunConfig) -> None:
    """Checks that all processes skipped the same rows, since a file may be unreadable for some of them only."""
    from accelerate.utils import gather_object

    if run.data.on_error != "skip" or accelerator.num_processes == 1:
        return
    skipped = gather_object([[(row["split"], row["row"]) for row in run.quarantine]])
    if any(rows != skipped[0] for rows in skipped):
        counts = ", ".join(str(len(rows)) for rows in skipped)
        raise DataError(
            f"data.on_error: processes skipped different rows (rows per process: {counts}), so some cannot read all "
            "data. Check the disk or network of the data and run the same command again."
        )


def _method_problems(run: RunConfig, task: Task | None) -> list[str]:
    """Returns why a probe does not support the labels of the task, if so."""
    missing = unsupported(task, Capability.PROBE) if task is not None and run.adapt.method == "probe" else ""
    return [missing] if missing else []


def _target_problems(run: RunConfig, head: HeadSpec) -> list[str]:
    """Checks that a head exists, and matches LoRA patterns on the meta-device model."""
    headless = method_problem(run.adapt.method, has_head=head.num_outputs > 0)
    if headless:
        return [headless]
    if run.adapt.method != "lora" or run.adapt.lora.target_modules is None:
        return []
    try:
        with suppress_logs():  # this model is discarded
            find_targets(build_on_meta(run, head), run.adapt.lora.target_modules)
    except HftlError as error:
        return error.problems
    return []


def _batch_problems(run: RunConfig, rows: int, task: Task | None) -> list[str]:
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        effective = run.train.batch_size_per_device * run.train.gradient_accumulation_steps * world
    except TypeError:
        return []  # not numbers: already reported
    if effective > rows:
        return [
            f"train.batch_size_per_device: the effective batch size of {effective} (batch size "
            f"{run.train.batch_size_per_device} x accumulation {run.train.gradient_accumulation_steps} x {world} "
            f"process(es)) is larger than the {rows} training rows. Set it to at most {rows}."
        ]
    if getattr(task, "depends_on_batch", False) and run.train.batch_size_per_device * world < 2:
        return [
            "train.batch_size_per_device: this loss compares the rows of a batch, so 1 is too small "
            "(train.gradient_accumulation_steps does not help). Set at least 2, preferably 64 or more."
        ]
    return []


def _hub_problems(run: RunConfig, is_valid: bool) -> list[str]:
    """Checks access to the repository; sends requests for a valid run only, since they may create the repository."""
    repo = run.hub.repo_id
    if not repo:
        return []
    problem = name_problem(repo)
    if problem is None and is_valid and is_main_process():
        problem = repository_problem(repo, run.hub.private)
        if problem is None:
            log(f"push: repository {repo} ({'private' if run.hub.private else 'visibility unchanged'}) is writable")
    return [f"hub.repo_id: {problem}"] if problem else []


def _tracker_problems(names: Sequence[str]) -> list[str]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    problems = [
        f"train.trackers: unknown tracker '{name}'; allowed: {', '.join(known)}.{nearest(name, known)}"
        for name in names
        if name not in known
    ]
    installed = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name in known and name not in installed]
    return problems + [
        f"train.trackers: '{name}' is not installed. Install it: uv pip install {name}." for name in missing
    ]


def _augment_problems(run: RunConfig, task: Task | None) -> list[str]:
    policy = run.data.augment.auto_augment
    if policy is None or task is None or task.modality != "image":
        return []
    from hftl.preprocessing.image_transforms import ImageProcessor

    preprocessing = {"input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    try:
        ImageProcessor(preprocessing, AugmentConfig(auto_augment=policy)).transform(True)
    except Exception:
        return [
            f"data.augment.auto_augment: '{policy}' is not a policy of timm. Set, for example, rand-m9-mstd0.5-inc1 "
            "(RandAugment with magnitude 9), augmix-m3-w3 or original (AutoAugment)."
        ]
    return []


def _metric_problems(run: RunConfig, task: Task | None) -> list[str]:
    if task is None:
        return metric_problems(run.train.metrics)
    own = [name for metric in task.metrics() for name in metric.compute()]
    head = task.head
    single_output = (
        head.problem_type == "single_label_classification"
        or head.problem_type == "regression"
        and head.num_outputs == 1
    )
    unsupported_reason = "" if single_output else "metrics of evaluate need one class or one number per row"
    problems = metric_problems(run.train.metrics, own, unsupported_reason)
    metric = run.train.metric_for_best_model
    if metric and not problems:
        computed = {"loss", *own, *(Path(name).stem for name in run.train.metrics)}
        if metric not in computed:
            allowed = ", ".join(sorted(computed))
            problems.append(
                f"train.metric_for_best_model: '{metric}' is not computed; allowed: {allowed}."
                f"{nearest(metric, computed)} Set an allowed metric or add it to train.metrics."
            )
    return problems


def _say_defaults(requested: RunConfig, resolved: RunConfig) -> None:
    """Logs defaults that were filled in and settings that are ignored."""
    if resolved.adapt.method == "probe":
        ignored = [f"train.{name}" for name in BY_STEPS if getattr(requested.train, name) is not None]
        if ignored:
            log(f"config: a probe has no training steps; {', '.join(ignored)} are ignored")
        return
    defaults = {
        name: getattr(resolved.train, name)
        for name in ("lr", "head_lr", "num_epochs", "freeze_backbone_ratio")
        if getattr(requested.train, name) is None and getattr(resolved.train, name) is not None
    }
    if defaults:
        method = requested.adapt.method if requested.model.pretrained else "training from scratch"
        log(
            f"config: defaults for {method}: "
            + ", ".join(f"train.{name} {value:g}" for name, value in defaults.items())
        )
