"""Adaptation method `probe`: a scikit-learn classifier fitted on cached features replaces the head."""

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
from hftl.heads.sklearn_probe import Probe, fit_classifier
from hftl.logging import log, suppress_logs
from hftl.models.build import build_on_meta
from hftl.models.task_model import HeadSpec, TaskModel
from hftl.run_folder.folder import get_run_folder
from hftl.run_folder.history import History, Recorder
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit_probe(accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> History:
    """Fits the scikit-learn classifier of `run.adapt.probe` on the training rows and puts it into `model`.

    The main process fits it and broadcasts it; the others wait up to `train.timeout_minutes`. There are no steps, so
    an interrupted run restarts from cached features.

    Args:
        accelerator: From `create_accelerator`.
        model: From `build_model` and `adapt`; changed in place. The coefficients of a linear classifier become the
            weights of the linear head; another classifier replaces that layer (`hftl.heads.sklearn_head`).
        task: Encodes rows and classes.
        splits: Uses `train` only; settings are selected by cross-validation.
        run: Resolved by `setup_run`.

    Returns:
        A history without steps; its `selection` has the cross-validation results and the selected settings.

    Raises:
        FeatureError: The classifier cannot be fitted to the features or their classes.
        AdaptError: The head of the model is not one linear layer.
    """
    freeze_backbone(model)
    layer = linear_head(model)
    with Recorder(accelerator, run, get_run_folder(run), 0, None) as recorder:
        features = compute_features(accelerator, model, task, splits["train"], run)
        # training time includes the cached features, as if this run had computed them
        recorder.started -= features.seconds if features.from_cache else 0.0
        if layer is None or layer.bias is None or not features.linear:
            raise AdaptError(no_linear_head(model))
        selection, weights, content = run_on_main(accelerator, lambda: _fit(features, task.head.num_outputs, run))
        if weights is None:
            model.use_sklearn_head(SklearnHead.from_bytes(content))
        else:
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weights[0]))
                layer.bias.copy_(torch.from_numpy(weights[1]))
        recorder.history.selection = selection
        with suppress_logs():  # `_fit` has logged it
            recorder.log({f"cross_validation/{name}": selection[name] for name in ("accuracy", "loss")})
        run_on_main(accelerator, recorder.flush)
    return recorder.history


def _fit(features: Features, num_outputs: int, run: RunConfig) -> tuple[dict[str, Any], Any, bytes]:
    """Returns the record of the fit, and either weight and bias or the file content of a scikit-learn head."""
    config = run.adapt.probe
    if features.labels is None or features.labels.ndim != 1 or features.labels.dtype.kind != "i":
        raise FeatureError("adapt.method: probe needs one class per training row. Set another method.")
    started = time.perf_counter()
    fitted: Probe = fit_classifier(
        features.values,
        features.labels,
        num_outputs,
        config.classifier,
        folds=config.num_folds,
        seed=run.train.seed,
        threads=torch.get_num_threads(),
    )
    record = fitted.record() | {"seconds": round(time.perf_counter() - started, 2)}
    settings = ", ".join(f"{name} {value:g}" for name, value in fitted.settings.items())
    log(
        f"train: fitted {fitted.head} with {settings}, best of {len(fitted.tried)} settings in {fitted.folds}-fold "
        f"cross-validation on {fitted.rows:,} rows: accuracy {fitted.accuracy:.4f}, log loss {fitted.loss:.4f}, "
        f"{record['seconds']:.1f} s"
    )
    if CLASSIFIERS[config.classifier].linear:
        return record, fitted.linear(), b""
    head = SklearnHead(config.classifier, fitted.estimator, num_outputs, fitted.calibration)
    return record, None, head.to_bytes()


def no_linear_head(model: TaskModel) -> str:
    """Returns the error message for a model whose head is not one linear layer."""
    text = "Set --model.pooling mean or cls, which adds one linear layer to pooled features"
    instruction = text if model.modality == "text" else "Set another model.name"
    layers = [f"{name} ({type(model.net.get_submodule(name)).__name__})" for name in model.head_modules]
    return (
        f"adapt.method: probe needs a head that is one linear layer with a bias; '{model.source.name}' has "
        f"{', '.join(layers)}. {instruction}, or adapt.method frozen."
    )


def probe_problems(run: RunConfig, head: HeadSpec, splits: Splits | None, task: Task | None) -> list[str]:
    """Returns the error messages for a probe that can be detected before features are computed.

    Args:
        run: The run configuration before defaults are filled in.
        head: Head of the task; a placeholder if the data could not be opened.
        splits: Uses `train`; None if the data could not be opened.
        task: None if the data could not be opened.
    """
    if run.adapt.method != "probe" or run.adapt.probe.classifier not in CLASSIFIERS:
        return []
    missing = None if CLASSIFIERS[run.adapt.probe.classifier].linear else skops_problem()
    problems = [f"adapt.probe.classifier: {missing}"] if missing else []
    problems += _head_problems(run, head)
    single = _single_rows(splits, task) if splits is not None and task is not None else []
    if single:
        problems.append(
            f"adapt.method: probe needs at least 2 training rows per class for cross-validation; class(es) "
            f"{shorten(single)} have a single training row. Add or remove rows, or set adapt.method frozen."
        )
    return problems


def _head_problems(run: RunConfig, head: HeadSpec) -> list[str]:
    """Checks the head of the model on the meta device, without weights."""
    try:
        with suppress_logs():  # this model is discarded
            model = build_on_meta(run, head)
    except HftlError as error:
        return error.problems
    layer = linear_head(model)
    return [no_linear_head(model)] if layer is None or layer.bias is None else []


def _single_rows(splits: Splits, task: Task) -> list[str]:
    """Returns the classes with one training row, for targets with a class column."""
    target = task.state().get("target", {})
    if not {"column", "names", "values"} <= set(target):
        return []
    counts = arrow_column(splits["train"], target["column"]).value_counts().to_pylist()
    single = {entry["values"] for entry in counts if entry["counts"] == 1}
    return [str(name) for name, value in zip(target["names"], target["values"], strict=True) if value in single]
