"""`prepare` refuses what cannot work, all at once; `start` is the only place that builds an Accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hftl.adaptation.lora import find_targets
from hftl.config.defaults import default_folder, resolve
from hftl.config.parse import dump
from hftl.config.schema import AugmentConfig, RunConfig, value_problems
from hftl.console import is_main_process, muted, say
from hftl.data.source import Splits, load_splits
from hftl.errors import ConfigError, HftlError, nearest
from hftl.evaluation.metrics import BUILT_IN, metric_problems
from hftl.hub import name_problem, repository_problem
from hftl.models.build import model_name_problem, skeleton
from hftl.models.parts import HeadSpec
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T", bound=Task)
RUN_FILES = ("config.yaml", "history.jsonl", "metrics.json", "model", "adapter", "checkpoints")
"""What a run leaves in its folder; `--overwrite` removes these."""
MARKER = "config.yaml"
"""Written first: only a folder that has it is ever cleared."""


def prepare(run: RunConfig, make_task: Callable[[Splits], T]) -> tuple[RunConfig, Splits, T]:
    """Opens the data, binds the task to it, and checks everything that can be known before a device is touched.

    Args:
        run: The configuration as given.
        make_task: A task class, or anything that makes a task from splits.

    Returns:
        The configuration with all defaults filled in, the splits, and the task.

    Raises:
        ConfigError: Every problem of configuration, data and model, in one message.
    """
    problems = [*run.problems, *value_problems(run)]
    splits, task = None, None
    if run.data.source:
        try:
            splits = load_splits(run.data)
            task = make_task(splits)
        except HftlError as error:
            problems += error.problems
    stock = getattr(make_task, "stock", None) or (task.head.stock if task else None)
    unknown = model_name_problem(run.model.name, stock) if stock and run.model.name else None
    if unknown:
        problems.append(unknown)
    elif stock and run.model.name and not any(problem.startswith(("model.", "adapt.")) for problem in problems):
        problems += _target_problems(run, task.head if task else HeadSpec(stock, 2))
    if splits:
        problems += _batch_problems(run, len(splits["train"]))
    problems += _augment_problems(run, task)
    problems += _metric_problems(run, task)
    problems += _tracker_problems(run.train.trackers) + folder_problems(run)
    problems += _hub_problems(run, otherwise_fine=not problems)
    if problems or splits is None or task is None:
        raise ConfigError(*problems)
    resolved = resolve(run, task.modality)
    _say_defaults(run, resolved)
    return resolved, splits, task


def start(run: RunConfig) -> Accelerator:
    """Returns the Accelerator of a run, seeds set and the run folder made.

    Processes, precision and sharding come from the launcher and its configuration file.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

    folder = run_folder(run)
    # as a plugin, because the launcher's environment overrides a plain number; and by count alone, because the
    # batches are ours and every step has all of its micro-batches
    accumulation = GradientAccumulationPlugin(run.train.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        gradient_accumulation_plugin=accumulation,
        log_with=[name for name in run.train.trackers if name] or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_main_process:
        _clear(folder, run)
        (folder / MARKER).write_text(dump(run), encoding="utf-8")
    accelerator.wait_for_everyone()
    set_seed(run.train.seed)
    say(
        f"start: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}, run folder {folder}"
    )
    return accelerator


def run_folder(run: RunConfig) -> Path:
    """Returns the run folder."""
    return Path(run.output_dir or default_folder(run))


def _target_problems(run: RunConfig, head: HeadSpec) -> list[str]:
    """Tries LoRA patterns on the architecture without its weights."""
    if run.adapt.method != "lora" or run.adapt.lora.target_modules is None:
        return []
    try:
        with muted():  # it is not the model that will be trained
            find_targets(skeleton(run, head), run.adapt.lora.target_modules)
    except HftlError as error:
        return error.problems
    return []


def _batch_problems(run: RunConfig, rows: int) -> list[str]:
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        effective = run.train.batch_size_per_device * run.train.gradient_accumulation_steps * world
    except TypeError:
        return []  # not numbers: said already
    if effective > rows:
        return [
            f"train.batch_size_per_device: the effective batch of {effective} (batch size "
            f"{run.train.batch_size_per_device} x accumulation {run.train.gradient_accumulation_steps} x {world} "
            f"process(es)) is larger than the {rows} training rows; lower it to at most {rows}."
        ]
    return []


def _hub_problems(run: RunConfig, otherwise_fine: bool) -> list[str]:
    """Asks the hub once, and only about a run that will start: a repository may be created."""
    repo = run.publish.push_to_hub
    if not repo:
        return []
    problem = name_problem(repo)
    if problem is None and otherwise_fine and is_main_process():
        problem = repository_problem(repo, run.publish.private)
        if problem is None:
            say(f"push: {repo} will receive the model ({'private' if run.publish.private else 'as visible as it is'})")
    return [f"publish.push_to_hub: {problem}"] if problem else []


def _tracker_problems(names: Sequence[str]) -> list[str]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    problems = [
        f"train.trackers: there is no tracker '{name}' (known: {', '.join(known)}).{nearest(name, known)}"
        for name in names
        if name not in known
    ]
    installed = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name in known and name not in installed]
    return problems + [f"train.trackers: '{name}' is not installed (uv pip install {name})." for name in missing]


def _augment_problems(run: RunConfig, task: Task | None) -> list[str]:
    policy = run.data.augment.auto_augment
    if policy is None or task is None or task.modality != "image":
        return []
    from hftl.data.image import ImageProcessor

    any_model = {"input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    try:
        ImageProcessor(any_model, AugmentConfig(auto_augment=policy)).transform(True)
    except Exception:
        return [
            f"data.augment.auto_augment: '{policy}' is not a policy of timm's; try rand-m9-mstd0.5-inc1 "
            "(RandAugment of strength 9), augmix-m3-w3 or original (AutoAugment)."
        ]
    return []


def _metric_problems(run: RunConfig, task: Task | None) -> list[str]:
    problems = metric_problems(run.train.metrics)
    wanted = run.train.best_metric
    if wanted and not problems and task is not None:
        computed = {"loss", *(name for metric in task.metrics() for name in metric.compute())}
        computed |= {Path(name).stem for name in run.train.metrics}
        if wanted not in computed:
            allowed = ", ".join(sorted(computed or BUILT_IN))
            problems.append(
                f"train.best_metric: '{wanted}' is not computed here; allowed: {allowed}, or name it in "
                f"train.metrics too.{nearest(wanted, computed)}"
            )
    return problems


def folder_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder cannot be written or holds a run that may not be replaced."""
    folder = run_folder(run)
    inputs = {"model.name": run.model.name.removeprefix("local-dir:"), "data.source": run.data.source}
    try:
        problems = _folder_problems(folder, run.overwrite)
        for name, value in inputs.items() if not problems else ():
            path = Path(value).resolve()
            if value and path.exists() and folder.resolve() in (path, *path.parents):
                return [f"output_dir: '{folder}' holds {name} ('{value}'); choose a folder outside of it."]
        return problems
    except OSError as error:
        return [f"output_dir: '{folder}' cannot be reached: {error.strerror}."]


def _folder_problems(folder: Path, overwrite: bool) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir: '{folder}' is a file."]
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and MARKER not in found:
        return [f"output_dir: '{folder}' holds {', '.join(found)}, but no run of hftl (no {MARKER}); choose another."]
    if found and not overwrite:
        return [f"output_dir: '{folder}' holds a run already ({', '.join(found)}). Choose another, or say --overwrite."]
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        return [f"output_dir: '{folder}' cannot be made: '{existing}' is a file."]
    if not os.access(existing, os.W_OK):
        return [f"output_dir: '{folder}' cannot be written: no write permission in '{existing}'."]
    return []


def _clear(folder: Path, run: RunConfig) -> None:
    """Makes the run folder; removes the files of an older run there, and nothing else."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    if not run.overwrite:
        return
    for name in (*RUN_FILES, "predictions.parquet", "report.json", "environment.json", "tensorboard"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _say_defaults(given: RunConfig, resolved: RunConfig) -> None:
    """Prints what was chosen because nothing was said."""
    chosen = {
        name: getattr(resolved.train, name)
        for name in ("lr", "head_lr", "num_epochs", "head_first")
        if getattr(given.train, name) is None and getattr(resolved.train, name) is not None
    }
    if chosen:
        method = given.adapt.method if given.model.pretrained else "training from scratch"
        say(f"config: defaults for {method}: " + ", ".join(f"train.{name} {value:g}" for name, value in chosen.items()))
