"""Defaults that depend on the way of adapting and on the modality, filled in and printed, never hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hftl.config.schema import AdaptConfig, RunConfig

# How these came about, and what chose them, is in RESULTS.md.
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
"""Settings of `train` that say how steps are made, None where the method chooses."""


def resolve(run: RunConfig, modality: str, own: Mapping[str, Mapping[str, float]] | None = None) -> RunConfig:
    """Returns `run` with every open default filled in.

    Args:
        run: The configuration as given; None means "choose for me".
        modality: `image` or `text`, from the task.
        own: The task's own settings by method (or `scratch`); they come before those of the modality.
    """
    if run.adapt.method == "probe":  # nothing is trained by steps: no rate or length applies, so none is in the record
        none = dict.fromkeys(BY_STEPS, None)
        return replace(run, train=replace(run.train, **none), output_dir=run.output_dir or default_folder(run))
    method = _strongest(run.adapt) if run.model.pretrained else "scratch"
    table = (own or {}).get(method) or _DEFAULTS.get((modality, method)) or _DEFAULTS["text", "full"]
    chosen = {name: value for name, value in table.items() if getattr(run.train, name) is None}
    if run.train.lr is not None and run.train.head_lr is None:
        # a backbone rate given by hand keeps the table's proportion between head and backbone
        chosen["head_lr"] = run.train.lr * (table["head_lr"] / table["lr"] if table["lr"] else 1.0)
    return replace(run, train=replace(run.train, **chosen), output_dir=run.output_dir or default_folder(run))


def _strongest(config: AdaptConfig) -> str:
    """Returns the way of adapting whose rates suit all encoders: those of full training are the smallest."""
    ways = {config.image_method or config.method, config.text_method or config.method}
    return next((way for way in ("full", "lora") if way in ways), config.method)


def default_epochs(method: str, modality: str, own: Mapping[str, Mapping[str, float]] | None = None) -> float | None:
    """Returns how many passes `resolve` gives to a method (or `scratch`); None to one that does not train in passes."""
    return ((own or {}).get(method) or _DEFAULTS.get((modality, method), {})).get("num_epochs")


def default_folder(run: RunConfig) -> str:
    """Returns runs/DATA-MODEL-METHOD-sSEED."""
    data = Path(run.data.source.removeprefix("embedded:")).stem or "data"
    model = Path(run.model.name.removeprefix("local-dir:").removeprefix("embedded:")).name.replace(":", "-") or "model"
    method = run.adapt.method if run.model.pretrained else "scratch"
    return str(Path("runs") / f"{data}-{model}-{method}-s{run.train.seed}")
