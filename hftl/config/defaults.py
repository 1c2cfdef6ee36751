"""Defaults that depend on adaptation method and modality; the run logs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hftl.config.schema import AdaptConfig, RunConfig

TaskDefaults = Mapping[str, Mapping[str, float]]
# RESULTS.md documents the tuning of these values
_DEFAULTS: dict[tuple[str, str], dict[str, float]] = {
    ("image", "full"): {"lr": 1e-5, "head_lr": 5e-3, "num_epochs": 8, "freeze_backbone_ratio": 0.5},
    ("image", "frozen"): {"lr": 0.0, "head_lr": 1e-2, "num_epochs": 8},
    ("image", "lora"): {"lr": 2e-4, "head_lr": 1e-2, "num_epochs": 6},
    ("image", "scratch"): {"lr": 1e-3, "head_lr": 1e-3, "num_epochs": 5},
    ("text", "full"): {"lr": 1e-4, "head_lr": 1e-3, "num_epochs": 3},
    ("text", "frozen"): {"lr": 0.0, "head_lr": 1e-2, "num_epochs": 8},
    ("text", "lora"): {"lr": 1e-3, "head_lr": 3e-3, "num_epochs": 4},
    ("text", "scratch"): {"lr": 3e-4, "head_lr": 3e-4, "num_epochs": 3},
}
BY_STEPS = (
    "num_epochs",
    "max_steps",
    "lr",
    "head_lr",
    "freeze_backbone_ratio",
    "eval_steps",
    "early_stopping_patience",
)
"""Settings of `train` that control optimizer steps; None selects the default of the method."""


def resolve(run: RunConfig, modality: str, task_defaults: TaskDefaults | None = None) -> RunConfig:
    """Returns `run` with all unset defaults filled in.

    Args:
        run: Configuration; None marks a value to fill in.
        modality: `image` or `text`, from the task.
        task_defaults: Defaults of the task by method (or `scratch`); they override those of the modality.
    """
    if run.adapt.method == "probe":  # a probe makes no optimizer steps: record no rate or length
        unset = dict.fromkeys(BY_STEPS, None)
        return replace(run, train=replace(run.train, **unset), output_dir=run.output_dir or default_folder(run))
    method = _method_of_rates(run.adapt) if run.model.pretrained else "scratch"
    defaults = (task_defaults or {}).get(method) or _DEFAULTS.get((modality, method)) or _DEFAULTS["text", "full"]
    filled = {name: value for name, value in defaults.items() if getattr(run.train, name) is None}
    if run.train.lr is not None and run.train.head_lr is None:
        # scale the head rate with an explicit backbone rate
        filled["head_lr"] = run.train.lr * (defaults["head_lr"] / defaults["lr"] if defaults["lr"] else 1.0)
    return replace(run, train=replace(run.train, **filled), output_dir=run.output_dir or default_folder(run))


def _method_of_rates(config: AdaptConfig) -> str:
    """Returns the adaptation method whose learning rates suit all encoders: full training has the smallest."""
    methods = {config.image_method or config.method, config.text_method or config.method}
    return next((method for method in ("full", "lora") if method in methods), config.method)


def default_epochs(method: str, modality: str, task_defaults: TaskDefaults | None = None) -> float | None:
    """Returns the default epochs of a method (or `scratch`); None for methods that do not train in epochs."""
    return ((task_defaults or {}).get(method) or _DEFAULTS.get((modality, method), {})).get("num_epochs")


def default_folder(run: RunConfig) -> str:
    """Returns runs/DATA-MODEL-METHOD-sSEED."""
    data = Path(run.data.source.removeprefix("embedded:")).stem or "data"
    model = Path(run.model.name.removeprefix("local-dir:").removeprefix("embedded:")).name.replace(":", "-") or "model"
    method = run.adapt.method if run.model.pretrained else "scratch"
    return str(Path("runs") / f"{data}-{model}-{method}-s{run.train.seed}")
