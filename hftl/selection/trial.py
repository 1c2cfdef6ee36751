"""Single run of a comparison, with the functions of a recipe."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hftl.config.schema import RunConfig


def train(run: RunConfig, task: str) -> None:
    """Trains, evaluates and saves one run, without an HTML report (`hftl report RUN` renders it).

    Args:
        run: Run configuration. With `resume: auto`, a complete run stays unchanged.
        task: Import path of the task class, as `module:name`.

    Raises:
        HftlError: As in a recipe.
    """
    from hftl.adaptation.apply import adapt
    from hftl.artifacts.save_run import RunResult, save_run
    from hftl.errors import RunComplete
    from hftl.evaluation.evaluate import evaluate
    from hftl.models.build import build_model
    from hftl.run.setup import create_accelerator, setup_run
    from hftl.run_folder.folder import get_run_folder
    from hftl.training.fit import fit

    run, splits, bound = setup_run(run, find_task(task))
    try:
        accelerator = create_accelerator(run)
    except RunComplete:
        return
    model = build_model(run, bound.head)
    report = adapt(model, run.adapt)
    history = fit(accelerator, model, bound, splits, run)
    metrics = evaluate(accelerator, model, bound, splits, run, get_run_folder(run) / "predictions.parquet")
    save_run(accelerator, model, bound, splits, run, RunResult(report, history, metrics), page=False)


def find_task(path: str) -> Any:
    """Imports the task class at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
