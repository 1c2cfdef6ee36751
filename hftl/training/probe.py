"""adapt.method probe: features once, a classic head fitted to them, the head put where the network has its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from hftl.adaptation.freeze import freeze_backbone
from hftl.config.schema import RunConfig
from hftl.data.columns import arrow_column
from hftl.data.splits import Splits
from hftl.distributed import run_on_main
from hftl.errors import AdaptError, FeatureError, HftlError, shorten
from hftl.features.cache import Features, compute_features
from hftl.features.extractor import linear_head
from hftl.heads.classifiers import CLASSIFIERS
from hftl.heads.sklearn_head import SklearnHead, skops_problem
from hftl.heads.sklearn_probe import Probe
from hftl.heads.sklearn_probe import fit_classifier as fit_head
from hftl.logging import log, suppress_logs
from hftl.models.build import build_on_meta
from hftl.models.task_model import HeadSpec, TaskModel
from hftl.run_folder.folder import get_run_folder
from hftl.run_folder.history import History, Recorder
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit_probe(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Fits the classic head that `run.adapt.probe` names to the training rows, and puts it into `model`.

    The main process fits it and sends it to the others, which wait as long as `train.timeout_minutes`. There are no
    steps: a run that was stopped begins again, from cached features.

    Args:
        accelerator: From `start`.
        model: From `build_model` and `adapt`; changed in place. A linear head becomes the weights of its own linear
            layer, another takes the place of this layer (`hftl.heads.sklearn_head`).
        task: Says how rows become inputs and classes.
        splits: Uses `train`; held-out splits choose nothing.
        run: Resolved by `prepare`.

    Returns:
        Without steps; what cross-validation tried and chose is its `selection`.

    Raises:
        FeatureError: The features or their classes allow no fit.
        AdaptError: The network's head is not one linear layer.
    """
    freeze_backbone(model)
    layer = linear_head(model)
    with Recorder(accelerator, run, get_run_folder(run), 0, None) as recorder:
        found = compute_features(accelerator, model, task, splits["train"], run)
        recorder.started -= found.seconds if found.from_cache else 0.0  # as if this run had computed them
        if layer is None or layer.bias is None or not found.linear:
            raise AdaptError(no_linear_head(model))
        chosen, weights, content = run_on_main(accelerator, lambda: _fit(found, task.head.num_outputs, run))
        if weights is None:
            model.use_sklearn_head(SklearnHead.from_bytes(content))
        else:
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weights[0]))
                layer.bias.copy_(torch.from_numpy(weights[1]))
        recorder.history.selection = chosen
        with suppress_logs():  # it has been said
            recorder.log({f"cross_validation/{name}": chosen[name] for name in ("accuracy", "loss")})
        run_on_main(accelerator, recorder.flush)
    return recorder.history


def _fit(found: Features, num_outputs: int, run: RunConfig) -> tuple[dict[str, Any], Any, bytes]:
    """Returns the record of the fit, and either weight and bias or the content of a classic head's file."""
    config = run.adapt.probe
    if found.labels is None or found.labels.ndim != 1 or found.labels.dtype.kind != "i":
        raise FeatureError("probe: training rows have no classes; a classic head needs one class a row.")
    began = time.perf_counter()
    fitted: Probe = fit_head(
        found.values,
        found.labels,
        num_outputs,
        config.classifier,
        folds=config.num_folds,
        seed=run.train.seed,
        threads=torch.get_num_threads(),
    )
    record = fitted.record() | {"seconds": round(time.perf_counter() - began, 2)}
    settings = ", ".join(f"{name} {value:g}" for name, value in fitted.settings.items())
    log(
        f"probe: {fitted.head} with {settings}, the best of {len(fitted.tried)} settings in {fitted.folds}-fold "
        f"cross-validation on {fitted.rows:,} rows: accuracy {fitted.accuracy:.4f} log-loss {fitted.loss:.4f} "
        f"({record['seconds']:.1f} s)"
    )
    if CLASSIFIERS[config.classifier].linear:
        return record, fitted.linear(), b""
    head = SklearnHead(config.classifier, fitted.estimator, num_outputs, fitted.calibration)
    return record, None, head.to_bytes()


def no_linear_head(model: TaskModel) -> str:
    """Returns the sentence that refuses a network whose head is not one linear layer."""
    text = "say --model.pooling mean (or cls), which puts one linear layer on pooled features"
    advice = text if model.modality == "text" else "choose another model"
    layers = [f"{name} ({type(model.net.get_submodule(name)).__name__})" for name in model.head_modules]
    return (
        "adapt.method: probe needs a network whose head is one linear layer with a bias; that of "
        f"{model.source.name} is {', '.join(layers)}. For this one {advice}, or say adapt.method frozen."
    )


def probe_problems(run: RunConfig, head: HeadSpec, splits: Splits | None, task: Task | None) -> list[str]:
    """Returns what is known to stand in the way of a probe before features are computed, a sentence each.

    Args:
        run: As given.
        head: What the task asks for, or would ask for.
        splits: Uses `train`; None where the data did not open.
        task: The same.
    """
    if run.adapt.method != "probe" or run.adapt.probe.classifier not in CLASSIFIERS:
        return []
    missing = None if CLASSIFIERS[run.adapt.probe.classifier].linear else skops_problem()
    problems = [f"adapt.probe.classifier: {missing}"] if missing else []
    problems += _head_problems(run, head)
    single = _single_rows(splits, task) if splits is not None and task is not None else []
    if single:
        problems.append(
            f"adapt.method: probe chooses its settings by cross-validation, and class(es) {shorten(single)} have a "
            "single training row. Add rows or drop the class, or say adapt.method frozen."
        )
    return problems


def _head_problems(run: RunConfig, head: HeadSpec) -> list[str]:
    """Looks at the network without its weights."""
    try:
        with suppress_logs():  # it is not the model that will be used
            bare = build_on_meta(run, head)
    except HftlError as error:
        return error.problems
    layer = linear_head(bare)
    return [no_linear_head(bare)] if layer is None or layer.bias is None else []


def _single_rows(splits: Splits, task: Task) -> list[str]:
    """Returns the classes with one training row, for targets that say which column holds the class."""
    target = task.state().get("target", {})
    if not {"column", "names", "values"} <= set(target):
        return []
    counted = arrow_column(splits["train"], target["column"]).value_counts().to_pylist()
    single = {entry["values"] for entry in counted if entry["counts"] == 1}
    return [str(name) for name, value in zip(target["names"], target["values"], strict=True) if value in single]
