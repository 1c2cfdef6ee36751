"""compare(): ways of training on the same split and budget, several seeds each, and whether transfer helped."""

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
    seeds: int = 3,
    run: RunConfig | None = None,
    config: str | Path | None = None,
    task: type[SupervisedTask] | None = None,
    output_dir: str | Path = "runs/compare",
    overwrite: bool = False,
) -> Comparison:
    """Trains a model in several ways, and says whether transfer helped on these data.

    All methods learn from the same rows for the same number of passes (see
    `hftl.selection.experiment_plan.make_experiment_plan`), each from the same seeds, each in a process of its own,
    one after another; every training leaves a run folder `METHOD-sSEED`. Called again with
    the same settings, complete runs are read and not trained again.

    The best method is chosen on validation; the verdict compares it with scratch on test (see
    `hftl.statistics.score_difference.difference`). Beside the runs are `compare.json` and the page `compare.html`;
    the run that is best on validation gets a report with the verdict in it.

    Args:
        data: Source as in `data.source`; that of `run` by default.
        model: As in `model.name`; that of `run` by default.
        methods: Of scratch, probe, frozen, lora and full. Without scratch they are compared with the simplest.
        seeds: Trainings of each method; `train.seed` counts up.
        run: Settings that all trainings share.
        config: YAML file with such settings, in place of `run`.
        task: A task class of an importable module; found by the columns of the data by default.
        output_dir: Folder of the runs.
        overwrite: Train again what is there.

    Returns:
        Results by method, the verdict (`verdict`, `sentence`) and warnings.

    Raises:
        ConfigError: Every problem of configuration, data and model, before anything is trained.
        ArtifactError: No training ended with a result.
        Stopped: A signal asked for it; the same call goes on.
    """
    if run is not None and config is not None:
        raise ConfigError("config: give settings as `run` or as a file, not as both.")
    base = load_config(config) if config is not None else run or RunConfig()
    base = replace(
        base,
        data=replace(base.data, source=data or base.data.source),
        model=replace(base.model, name=model or base.model.name),
    )
    folder, methods = Path(output_dir), list(dict.fromkeys(methods))
    problems = [*method_problems(methods, seeds, base), *_place_problems(folder, task)]
    if problems:
        raise ConfigError(*problems)
    with _interruptible():
        place = f"{task.__module__}:{task.__qualname__}" if task else None
        plan = run_in_child(make_experiment_plan, base, methods, seeds, folder, overwrite, place)
        log(f"compare: {len(methods)} methods x {seeds} seeds; {plan.budget}; runs in {folder}")
        found = run_plan(plan)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / COMPARISON, json.dumps(found.to_dict(), indent=2))
    compare_reports([folder / name for result in found.results for name in result.runs], folder / PAGE, found.to_dict())
    if found.kept is not None:
        attach(found, folder / found.kept)
    log(f"\nWritten: {folder / PAGE}")
    return found


def run_plan(plan: ExperimentPlan) -> Comparison:
    """Trains what is planned, one after another, and judges it; the table is printed.

    A training that fails is a line with its reason; the others go on.

    Args:
        plan: From `make_experiment_plan`, or of your own making.

    Raises:
        ArtifactError: No training has a result.
        Stopped: One was asked to stop.
    """
    folders: dict[str, dict[int, Path]] = {method: {} for method in plan.trainings}
    failures: dict[str, list[Failure]] = {method: [] for method in plan.trainings}
    width = max(map(len, plan.trainings))
    for method, runs in plan.trainings.items():
        for run in runs:
            place, seed = Path(run.output_dir or ""), run.train.seed
            log_file = place.with_name(f"{place.name}.log")
            try:
                if str(place) not in plan.complete:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    log_file.unlink(missing_ok=True)
                    run_in_child(train, run, plan.task, log=log_file)
            except Stopped as stopped:
                happened = stopped.problems[0].partition(";")[0]  # what follows is about a run alone
                raise Stopped(
                    f"{method}, seed {seed}: {happened}. Complete runs are kept; the same call goes on from here."
                ) from None
            except HftlError as error:
                failures[method].append(Failure(seed, f"{first_line(error)} ({log_file})"))
                log(f"  {method:<{width}} seed {seed}: failed: {first_line(error)}")
                continue
            folders[method][seed] = place
            log(f"  {method:<{width}} seed {seed}: {_measured(place, plan.split)}")
    found = judge(folders, plan.split, plan.budget, failures)
    log("\n" + format_comparison(found) + "\n\n" + found.sentence)
    for warning in found.warnings:
        log(f"Note: {warning}")
    return found


def _place_problems(folder: Path, task: type | None) -> list[str]:
    problems = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(
            "compare starts its trainings itself, each on one process; call it without several processes of a "
            "launcher. To train each run on several, launch a recipe for each and put the runs side by side with "
            "`hftl report RUN RUN …`."
        )
    if folder.exists() and not folder.is_dir():
        problems.append(f"output_dir: '{folder}' is a file.")
    if task is not None and task.__module__ == "__main__":
        problems.append(
            f"task: {task.__name__} is defined in the script itself, which trainings in processes of their own cannot "
            "import; put it into a module beside it."
        )
    return problems


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped; complete runs are kept, and the same call goes on from here.") from None


def _measured(place: Path, split: str) -> str:
    record = RunRecord(place)
    seconds = record.facts.get("training", {}).get("seconds", float("nan"))
    accuracy = record.metrics.get(f"{split}/accuracy")
    return f"{split} accuracy {float('nan') if accuracy is None else accuracy:.3f} ({seconds:.1f} s)"


def attach(found: Comparison, folder: Path) -> None:
    """Puts a comparison into the folder of the run that it kept, and draws that run's report with it."""
    write_text(folder / COMPARISON, json.dumps(found.to_dict(), indent=2))
    write_report(folder)
