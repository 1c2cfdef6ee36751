"""Comparison of training methods on the same split and budget, over several seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.atomic_files import write_text
from hftl.config.parse import load_config
from hftl.config.schema import RunConfig
from hftl.errors import ConfigError, HftlError, Stopped, first_line
from hftl.logging import log
from hftl.reporting import compare_reports, write_report
from hftl.reporting.run_record import COMPARISON, RunRecord
from hftl.run.child_process import run_in_child
from hftl.selection.experiment_plan import ExperimentPlan, make_experiment_plan, method_problems
from hftl.selection.results import Comparison, Failure, format_comparison, judge
from hftl.selection.trial import train

if TYPE_CHECKING:
    from hftl.tasks.task import SupervisedTask


PAGE = "compare.html"


def compare(
    data: str | None = None,
    model: str | None = None,
    methods: Sequence[str] = ("scratch", "frozen", "lora", "full"),
    *,
    num_seeds: int = 3,
    run: RunConfig | None = None,
    config: str | Path | None = None,
    task: type[SupervisedTask] | None = None,
    output_dir: str | Path = "runs/compare",
    overwrite: bool = False,
) -> Comparison:
    """Trains a model with several methods and measures the transfer gain.

    All methods train on the same rows for the same number of epochs (see
    `hftl.selection.experiment_plan.make_experiment_plan`) and with the same seeds. Runs execute one after another, each
    in a separate process, and write a run folder `METHOD-sSEED`. A repeated call with the same settings reuses complete
    runs.

    The best method is selected on validation and compared with scratch on test (see
    `hftl.statistics.score_difference.difference`). The folder of the runs also contains `compare.json` and
    `compare.html`. The report of the best run on validation includes the comparison.

    Args:
        data: Source as in `data.source`; default: that of `run`.
        model: As `model.name`; default: that of `run`.
        methods: Training methods: scratch, probe, frozen, lora, full. The baseline is scratch, or else the simplest
            method.
        num_seeds: Runs per method, at least 1; they use `train.seed`, `train.seed` + 1, ….
        run: Settings shared by all runs.
        config: YAML file with shared settings, instead of `run`.
        task: Task class in an importable module; default: detected from the columns.
        output_dir: Folder of the runs.
        overwrite: Replace existing runs.

    Returns:
        Results by method, the conclusion (`conclusion`, `sentence`) and warnings.

    Raises:
        ConfigError: Configuration, data or model are invalid; lists all problems before any training.
        ArtifactError: No run has a result.
        Stopped: A stop signal was received; the same call resumes.
    """
    if run is not None and config is not None:
        raise ConfigError("config: conflicts with `run`. Pass only one.")
    base = load_config(config) if config is not None else run or RunConfig()
    base = replace(
        base,
        data=replace(base.data, source=data or base.data.source),
        model=replace(base.model, name=model or base.model.name),
    )
    folder, methods = Path(output_dir), list(dict.fromkeys(methods))
    problems = [*method_problems(methods, num_seeds, base), *_call_problems(folder, task)]
    if problems:
        raise ConfigError(*problems)
    with _stop_on_interrupt():
        task_path = f"{task.__module__}:{task.__qualname__}" if task else None
        plan = run_in_child(make_experiment_plan, base, methods, num_seeds, folder, overwrite, task_path)
        log(f"compare: {len(methods)} methods x {num_seeds} seeds; {plan.budget}; runs in {folder}")
        comparison = run_plan(plan)
    folder.mkdir(parents=True, exist_ok=True)
    values = comparison.to_dict()
    write_text(folder / COMPARISON, json.dumps(values, indent=2))
    compare_reports([folder / name for result in comparison.results for name in result.runs], folder / PAGE, values)
    if comparison.kept is not None:
        attach(comparison, folder / comparison.kept)
    log(f"\ncompare: wrote {folder / PAGE}")
    return comparison


def run_plan(plan: ExperimentPlan) -> Comparison:
    """Executes the runs of a plan one after another and logs the comparison.

    A failed run is logged with its reason; the other runs continue.

    Args:
        plan: Plan, such as from `make_experiment_plan`.

    Raises:
        ArtifactError: No run has a result.
        Stopped: A run received a stop signal.
    """
    folders: dict[str, dict[int, Path]] = {method: {} for method in plan.runs}
    failures: dict[str, list[Failure]] = {method: [] for method in plan.runs}
    width = max(map(len, plan.runs))
    for method, runs in plan.runs.items():
        for run in runs:
            folder, seed = Path(run.output_dir or ""), run.train.seed
            log_file = folder.with_name(f"{folder.name}.log")
            try:
                if str(folder) not in plan.complete:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    log_file.unlink(missing_ok=True)
                    run_in_child(train, run, plan.task, log=log_file)
            except Stopped as stopped:
                event = stopped.problems[0].partition(";")[0]  # the rest applies to a single run
                raise Stopped(
                    f"{method}, seed {seed}: {event}. Complete runs are preserved. Repeat the call to resume."
                ) from None
            except HftlError as error:
                failures[method].append(Failure(seed, f"{first_line(error)} ({log_file})"))
                log(f"  {method:<{width}} seed {seed}: failed: {first_line(error)}")
                continue
            folders[method][seed] = folder
            log(f"  {method:<{width}} seed {seed}: {_result_line(folder, plan.split)}")
    comparison = judge(folders, plan.split, plan.budget, failures)
    log("\n" + format_comparison(comparison) + "\n\n" + comparison.sentence)
    for warning in comparison.warnings:
        log(f"Note: {warning}")
    return comparison


def _call_problems(folder: Path, task: type | None) -> list[str]:
    problems = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(
            "compare: starts its runs itself, each in one process. Run it without a multi-process launcher, or launch "
            "a recipe per run and compare the runs with `hftl report RUN RUN …`."
        )
    if folder.exists() and not folder.is_dir():
        problems.append(f"output_dir: '{folder}' is a file. Set a folder.")
    if task is not None and task.__module__ == "__main__":
        problems.append(
            f"task: {task.__name__} is defined in the main script, which separate processes cannot import. Move it to "
            "an importable module."
        )
    return problems


@contextmanager
def _stop_on_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped. Complete runs are preserved. Repeat the call to resume.") from None


def _result_line(folder: Path, split: str) -> str:
    record = RunRecord(folder)
    seconds = record.facts.get("training", {}).get("seconds", float("nan"))
    accuracy = record.metrics.get(f"{split}/accuracy")
    return f"{split} accuracy {float('nan') if accuracy is None else accuracy:.3f} ({seconds:.1f} s)"


def attach(comparison: Comparison, folder: Path) -> None:
    """Writes a comparison to the folder of its best run and renders the report of that run."""
    write_text(folder / COMPARISON, json.dumps(comparison.to_dict(), indent=2))
    write_report(folder)
