"""Experiment plan of a comparison: settings of all runs, which differ in the training method only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hftl.config.allowed_values import value_problems
from hftl.config.defaults import default_epochs, resolve
from hftl.config.schema import RunConfig
from hftl.errors import ConfigError, HftlError, nearest
from hftl.logging import suppress_logs
from hftl.selection.trial import find_task
from hftl.tasks.capabilities import Capability

SCRATCH = "scratch"
"""Training of the same architecture from random weights; the baseline of transfer learning."""
METHODS = (SCRATCH, "probe", "frozen", "lora", "full")
"""Training methods: scratch, then from the simplest to the most expensive."""


@dataclass(frozen=True)
class ExperimentPlan:
    """Runs of a comparison."""

    runs: dict[str, list[RunConfig]]
    """Configurations by method, one per seed."""
    task: str
    """Import path of the task class, as `module:name`."""
    budget: str
    """Training budget shared by all methods, as text."""
    split: str
    """Split on which the methods are compared."""
    complete: list[str] = field(default_factory=list)
    """Folders of complete runs."""


def make_experiment_plan(
    base: RunConfig,
    methods: Sequence[str],
    num_seeds: int,
    folder: Path,
    overwrite: bool,
    task: str | None = None,
) -> ExperimentPlan:
    """Opens the data, creates the settings of all runs and validates them before any training.

    Budget: all methods train for the same number of epochs on the same training rows (`train.num_epochs` or
    `train.max_steps`; default: the largest default of the compared methods, so that no method has fewer epochs than in
    a single run). Each method uses its default learning rates, unless they are set: no single rate suits all methods.
    Head search and probe cross-validation run as in single runs. The cost per epoch differs and is reported.

    Args:
        base: Settings shared by all runs.
        methods: Distinct names of `METHODS`.
        num_seeds: Runs per method, with `train.seed` from that of `base` upwards. All runs use the same split.
        folder: Parent of the run folders.
        overwrite: Replace existing runs; otherwise reuse complete runs and resume incomplete ones.
        task: Import path of the task class, as `module:name`; default: detected from the columns.

    Raises:
        ConfigError: Configuration, data or model are invalid; lists all problems.
    """
    from hftl.data.usable_rows import load_usable_splits
    from hftl.run.setup import setup_run
    from hftl.run_folder.folder import finished_metrics, resume_problems
    from hftl.tasks.auto_task import infer_task
    from hftl.tasks.registry import TASKS, unsupported

    try:
        with suppress_logs():
            task_class: Any = find_task(task) if task else TASKS.get(base.task)
            splits, _ = load_usable_splits(
                base.data, lambda splits: (task_class or infer_task(splits))(splits), pair_loss=base.train.pair_loss
            )
            task_class = task_class or infer_task(splits)
            bound = task_class(splits)
    except HftlError as error:
        raise ConfigError(*base.problems, *value_problems(base), *error.problems) from None
    base, length = _with_budget(replace(base, task=bound.name), methods, bound)
    missing = unsupported(bound, Capability.COMPARE)
    problems = [*([missing] if missing else []), *_split_problems(list(splits))]
    runs = {
        method: [trial(base, method, base.train.seed + index, folder, overwrite) for index in range(num_seeds)]
        for method in methods
    }
    complete = []
    for method_runs in runs.values():
        for run in method_runs:
            resolved = resolve(run, bound.modality, getattr(bound, "defaults", {}))
            problems += resume_problems(resolved)
            if run.resume == "auto" and finished_metrics(resolved) is not None:
                complete.append(str(run.output_dir))
        try:
            with suppress_logs():
                setup_run(method_runs[0], task_class)
        except HftlError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    has_rate = base.train.lr is not None or base.train.head_lr is not None
    rates = "same learning rates for all methods" if has_rate else "default learning rates of each method"
    budget = f"{length} on the same {len(splits['train']):,} training rows for every method; {rates}"
    if "probe" in methods:
        budget += "; the probe is fitted to all rows at once"
    split = "test" if "test" in splits else "validation"
    return ExperimentPlan(runs, f"{task_class.__module__}:{task_class.__qualname__}", budget, split, complete)


def trial(base: RunConfig, method: str, seed: int, folder: Path, overwrite: bool) -> RunConfig:
    """Returns the settings of one run of a comparison."""
    scratch = method == SCRATCH
    return replace(
        base,
        model=replace(base.model, pretrained=not scratch),
        adapt=replace(base.adapt, method="full" if scratch else method),
        train=replace(base.train, seed=seed),
        output_dir=str(folder / f"{method}-s{seed}"),
        overwrite=overwrite,
        resume="never" if overwrite else "auto",
    )


def method_problems(methods: Sequence[str], num_seeds: int, base: RunConfig) -> list[str]:
    """Returns an error message for each invalid argument of a comparison, without opening data or model."""
    problems = [
        f"methods: '{method}' is invalid; allowed: {', '.join(METHODS)}.{nearest(str(method), METHODS)}"
        for method in methods
        if method not in METHODS
    ]
    if len(set(methods)) < 2:
        problems.append(f"methods: {len(set(methods))} method(s) cannot be compared. Pass at least two.")
    if isinstance(num_seeds, bool) or not isinstance(num_seeds, int) or num_seeds < 1:
        problems.append(f"num_seeds: {num_seeds!r} is invalid; allowed: integers, at least 1.")
    if base.hub.repo_id:
        problems.append(
            f"hub.repo_id: '{base.hub.repo_id}' is invalid, because a comparison pushes no run. Remove it and run "
            "`hftl push RUN USER/NAME`."
        )
    return problems


def _split_problems(splits: Sequence[str]) -> list[str]:
    if "validation" in splits:
        return []
    return ["data.validation_fraction: no validation rows to select the best method on. Set it above 0."]


def _with_budget(base: RunConfig, methods: Sequence[str], task: Any) -> tuple[RunConfig, str]:
    """Returns `base` with the training length of all runs, and the length as text."""
    if base.train.max_steps is not None:
        return base, f"{base.train.max_steps:,} steps"
    task_defaults = getattr(task, "defaults", {})
    epochs = base.train.num_epochs or max(
        default_epochs(method, task.modality, task_defaults) or 1 for method in methods
    )
    return replace(base, train=replace(base.train, num_epochs=epochs)), f"{epochs:g} epochs"
