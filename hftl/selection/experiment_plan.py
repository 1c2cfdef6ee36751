"""What a comparison trains: the settings of every run, so that they differ in the way of training and nothing else."""

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
"""The same architecture with random weights: what transfer is measured against."""
METHODS = (SCRATCH, "probe", "frozen", "lora", "full")
"""Ways of training; those after scratch from the simplest to the dearest."""


@dataclass(frozen=True)
class ExperimentPlan:
    """The trainings of a comparison."""

    trainings: dict[str, list[RunConfig]]
    """By method, one for each seed."""
    task: str
    """Where the task class is, as `module:name`: what is sent to other processes."""
    budget: str
    """What is the same for all, in words."""
    split: str
    """The split that the verdict is about."""
    complete: list[str] = field(default_factory=list)
    """Run folders that hold a complete run already."""


def make_experiment_plan(
    base: RunConfig,
    methods: Sequence[str],
    seeds: int,
    folder: Path,
    overwrite: bool,
    task: str | None = None,
) -> ExperimentPlan:
    """Opens the data, writes out the settings of every run, and checks all that can be known before a training.

    Budget: every method makes the same number of passes over the same training rows (`train.num_epochs`, or
    `train.max_steps`; without them the largest default of the methods that are compared, so that none has fewer than it
    would have alone). Learning rates stay each method's own unless they are given: one rate for all would be the
    wrong one for most. Frozen tries its grid of heads and a probe its settings, as they do alone. What a pass costs
    differs, and is reported beside the result.

    Args:
        base: What all runs share.
        methods: Of `METHODS`, each once.
        seeds: Trainings of each; their `train.seed` counts up from that of `base`. The split is the same for all.
        folder: Gets one run folder for each.
        overwrite: Replace runs that are there; otherwise complete ones are kept and unfinished ones go on.
        task: Where the task class is, as `module:name`; found by the columns of the data by default.

    Raises:
        ConfigError: Every problem of configuration, data and model, in one message.
    """
    from hftl.data.usable_rows import load_usable_splits
    from hftl.run.setup import setup_run
    from hftl.run_folder.folder import finished_metrics, resume_problems
    from hftl.tasks.auto_task import infer_task
    from hftl.tasks.registry import TASKS, unsupported

    try:
        with suppress_logs():
            named: Any = find_task(task) if task else TASKS.get(base.task)
            splits, _ = load_usable_splits(
                base.data, lambda splits: (named or infer_task(splits))(splits), pair_loss=base.train.pair_loss
            )
            kind: Any = named or infer_task(splits)
            bound = kind(splits)
    except HftlError as error:
        raise ConfigError(*base.problems, *value_problems(base), *error.problems) from None
    base, passes = _with_budget(replace(base, task=bound.name), methods, bound)
    missing = unsupported(bound, Capability.COMPARE)
    problems = [*([missing] if missing else []), *_split_problems(list(splits))]
    trainings = {
        method: [trial(base, method, base.train.seed + number, folder, overwrite) for number in range(seeds)]
        for method in methods
    }
    complete = []
    for runs in trainings.values():
        for run in runs:
            there = resolve(run, bound.modality, getattr(bound, "defaults", {}))
            problems += resume_problems(there)
            if run.resume == "auto" and finished_metrics(there) is not None:
                complete.append(str(run.output_dir))
        try:
            with suppress_logs():
                setup_run(runs[0], kind)
        except HftlError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    rates = "all at the learning rate that was given" if _rate_given(base) else "rates are each method's own"
    budget = f"{passes} over the same {len(splits['train']):,} training rows for every method; {rates}"
    if "probe" in methods:
        budget += "; a probe is fitted to all of them at once"
    split = "test" if "test" in splits else "validation"
    return ExperimentPlan(trainings, f"{kind.__module__}:{kind.__qualname__}", budget, split, complete)


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


def method_problems(methods: Sequence[str], seeds: int, base: RunConfig) -> list[str]:
    """Returns a sentence for each wish that a comparison cannot fulfil, seen without opening anything."""
    problems = [
        f"methods: '{method}' is not one of {', '.join(METHODS)}.{nearest(str(method), METHODS)}"
        for method in methods
        if method not in METHODS
    ]
    if len(set(methods)) < 2:
        problems.append("methods: name at least two; one alone cannot be compared.")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        problems.append(f"seeds: {seeds!r} is not a whole number of at least 1.")
    if base.hub.repo_id:
        problems.append(
            "hub.repo_id: a comparison makes many runs and pushes none; push the one that you want with "
            "`hftl push RUN USER/NAME`."
        )
    return problems


def _rate_given(base: RunConfig) -> bool:
    return base.train.lr is not None or base.train.head_lr is not None


def _split_problems(splits: Sequence[str]) -> list[str]:
    if "validation" in splits:
        return []
    return ["data.validation_fraction: without validation rows nothing could choose the best method; say more than 0."]


def _with_budget(base: RunConfig, methods: Sequence[str], task: Any) -> tuple[RunConfig, str]:
    """Returns `base` with the length of all trainings in it, and that in words."""
    if base.train.max_steps is not None:
        return base, f"{base.train.max_steps:,} steps"
    own = getattr(task, "defaults", {})
    epochs = base.train.num_epochs or max(default_epochs(method, task.modality, own) or 1 for method in methods)
    return replace(base, train=replace(base.train, num_epochs=epochs)), f"{epochs:g} passes"
