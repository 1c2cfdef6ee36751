"""`prepare` refuses what cannot work, all at once; `start` is the only place that builds an Accelerator."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hftl.adaptation.lora import find_targets
from hftl.config.defaults import default_folder, resolve
from hftl.config.parse import dump, load
from hftl.config.schema import AugmentConfig, RunConfig, leaves, value_problems
from hftl.console import is_main_process, muted, say
from hftl.data.source import Splits, load_splits
from hftl.errors import ConfigError, HftlError, RunComplete, first_line, nearest, shorten
from hftl.evaluation.metrics import BUILT_IN, metric_problems
from hftl.files import write_text
from hftl.hub import name_problem, repository_problem
from hftl.models.build import model_name_problem, skeleton
from hftl.models.parts import HeadSpec
from hftl.processes import group_options, together
from hftl.tasks.task import Task
from hftl.train.checkpoint import clear_partial

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T", bound=Task)
RUN_FILES = ("config.yaml", "history.jsonl", "metrics.json", "model", "adapter", "checkpoints")
"""What a run leaves in its folder; `--overwrite` removes these."""
MARKER = "config.yaml"
"""Written first: only a folder that has it is ever cleared."""
MAY_CHANGE = (
    "checkpoint.", "data.num_workers", "data.worker_timeout", "output_dir", "overwrite", "publish.", "resume",
    "train.batch_size_per_device", "train.gradient_accumulation_steps", "train.log_every", "train.max_nonfinite",
    "train.on_", "train.timeout_minutes", "train.trackers",
)  # fmt: skip
"""Settings that may differ when a run goes on. The rows of a step stay as they were, whatever batches it is made of."""


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
    if splits and not _resumes(run):  # a run that goes on keeps the rows of its steps
        problems += _batch_problems(run, len(splits["train"]))
    problems += _augment_problems(run, task)
    problems += _metric_problems(run, task)
    problems += _tracker_problems(run.train.trackers) + folder_problems(run)
    problems += _hub_problems(run, otherwise_fine=not problems)
    if problems or splits is None or task is None:
        raise ConfigError(*problems)
    resolved = resolve(run, task.modality)
    different = _resume_problems(resolved)
    if different:
        raise ConfigError(*different)
    _say_defaults(run, resolved)
    return resolved, splits, task


def start(run: RunConfig) -> Accelerator:
    """Returns the Accelerator of a run, seeds set and the run folder made.

    Processes, precision and sharding come from the launcher and its configuration file.

    Raises:
        RunComplete: `run.resume` is auto and the run folder holds the finished run.
    """
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        ProjectConfiguration,
        broadcast_object_list,
        set_seed,
    )

    folder = run_folder(run)
    # the loop accumulates; as a plugin, because the launcher's environment overrides a plain number
    accumulation = GradientAccumulationPlugin(1, sync_with_dataloader=False)
    accelerator = Accelerator(
        gradient_accumulation_plugin=accumulation,
        log_with=[name for name in run.train.trackers if name] or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
        step_scheduler_with_optimizer=False,
        # no exchange in a forward pass, which a process short of memory repeats: evaluation shares what moves
        kwargs_handlers=[
            group_options(run.train.timeout_minutes),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    finished = finished_metrics(folder) if run.resume == "auto" and accelerator.is_main_process else None
    finished = broadcast_object_list([finished])[0] if accelerator.num_processes > 1 else finished
    if finished is not None:
        raise RunComplete(str(folder), finished)
    with together("make the run folder"):
        if accelerator.is_main_process:
            _make_folder(folder, run)
            write_text(folder / MARKER, dump(run))
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
    if run.overwrite and run.resume == "auto":
        return ["resume: 'auto' goes on with what is in the run folder and overwrite removes it; choose one."]
    inputs = {"model.name": run.model.name.removeprefix("local-dir:"), "data.source": run.data.source}
    try:
        problems = _folder_problems(folder, replaceable=run.overwrite or run.resume == "auto")
        for name, value in inputs.items() if not problems else ():
            path = Path(value).resolve()
            if value and path.exists() and folder.resolve() in (path, *path.parents):
                return [f"output_dir: '{folder}' holds {name} ('{value}'); choose a folder outside of it."]
        return problems
    except OSError as error:
        return [f"output_dir: '{folder}' cannot be reached: {error.strerror}."]


def _folder_problems(folder: Path, replaceable: bool) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir: '{folder}' is a file."]
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and MARKER not in found:
        return [f"output_dir: '{folder}' holds {', '.join(found)}, but no run of hftl (no {MARKER}); choose another."]
    if found and not replaceable:
        return [
            f"output_dir: '{folder}' holds a run already ({', '.join(found)}). Choose another, say --resume auto to go "
            "on with it, or --overwrite."
        ]
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        return [f"output_dir: '{folder}' cannot be made: '{existing}' is a file."]
    if not os.access(existing, os.W_OK):
        return [f"output_dir: '{folder}' cannot be written: no write permission in '{existing}'."]
    return []


def finished_metrics(folder: Path) -> dict[str, float | None] | None:
    """Returns the metrics of the finished run in a folder, or None where there is no run or it is not finished."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if report.get("complete") else None
    except (OSError, ValueError):
        return None


def _resumes(run: RunConfig) -> bool:
    return run.resume == "auto" and any((run_folder(run) / "checkpoints").glob("step-*"))


def _resume_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder holds a run with other settings, as far as they change its results."""
    marker = run_folder(run) / MARKER
    if run.resume != "auto" or not marker.is_file():
        return []
    try:
        before = leaves(load(marker))
    except HftlError as error:
        return [f"resume: {marker} cannot be read: {first_line(error)} Choose another output_dir, or say --overwrite."]
    now = leaves(run)
    changed = [
        f"{name} was {before[name]}, now {value}"
        for name, value in now.items()
        if value != before[name] and not name.startswith(MAY_CHANGE)
    ]
    if not changed:
        return []
    return [
        f"resume: '{run_folder(run)}' holds a run with other settings ({shorten(changed, 6)}). Give it the same ones, "
        "or choose another output_dir."
    ]


def _make_folder(folder: Path, run: RunConfig) -> None:
    """Makes the run folder; removes the files of a run there that is replaced or never came to a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if _resumes(run):
        clear_partial(folder)
        return
    if not (run.overwrite or run.resume == "auto"):
        return
    for name in (*RUN_FILES, "predictions.parquet", "report.json", "environment.json", "tensorboard"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    clear_partial(folder)


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
