"""Names of version 0.1.0 that changed: what answers to an old name, and what upgrades the files of old runs.

The one table of renames. What users write (flags, settings, Python names, members of custom tasks) is rejected with the
new name; files that hftl wrote (run folders, saved models) are upgraded when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SETTINGS = {
    "adapt.frozen.seeds": "adapt.frozen.num_seeds",
    "adapt.frozen.views": "adapt.frozen.num_views",
    "adapt.image": "adapt.image_method",
    "adapt.probe.folds": "adapt.probe.num_folds",
    "adapt.probe.head": "adapt.probe.classifier",
    "adapt.text": "adapt.text_method",
    "checkpoint.every_minutes": "checkpoint.save_minutes",
    "checkpoint.every_steps": "checkpoint.save_steps",
    "checkpoint.keep": "checkpoint.total_limit",
    "data.max_skipped": "data.max_skipped_fraction",
    "data.pair_loss": "train.pair_loss",
    "data.train_per_class": "data.max_train_samples_per_class",
    "model.decoder_size": "model.decoder_channels",
    "model.detector.levels": "model.detector.num_feature_levels",
    "model.detector.width": "model.detector.d_model",
    "model.fusion_size": "model.fusion_dim",
    "model.projection_size": "model.projection_dim",
    "publish.private": "hub.private",
    "publish.push_to_hub": "hub.repo_id",
    "publish.verify": "hub.verify",
    "train.best_metric": "train.metric_for_best_model",
    "train.eval_every": "train.eval_steps",
    "train.head_first": "train.freeze_backbone_ratio",
    "train.log_every": "train.logging_steps",
    "train.max_nonfinite": "train.max_nonfinite_steps",
    "train.schedule": "train.lr_scheduler_type",
}
"""Old setting -> new setting."""
VALUES = {
    ("adapt.batch_norm", "keep"): "frozen",
    ("adapt.batch_norm", "update"): "train",
    ("model.pooling", "stock"): "default",
}
"""(New setting, old value) -> new value."""
FLAGS = {"--no-verify": "--no_verify", "--seeds": "--num_seeds"}
"""Old flag of an `hftl` command -> new flag."""
FINDINGS = {
    "conflicts": "conflicting_labels",
    "imbalance": "class_imbalance",
    "odd_images": "outlier_images",
    "overlong": "too_long",
    "wrong_labels": "label_errors",
}
"""Old finding of `hftl check` -> new finding."""
PYTHON_NAMES = {
    "Outcome": "RunResult",
    "PublishConfig": "HubConfig",
    "load_artifact": "load_model_and_task",
    "parse": "parse_config",
    "prepare": "setup_run",
    "publish": "save_run",
    "run_folder": "get_run_folder",
    "start": "create_accelerator",
    "testing": "run.testing",
}
"""Old attribute of the package `hftl` -> new attribute."""
MEMBERS = {
    "across_rows": "depends_on_batch",
    "bad_rows": "invalid_rows",
    "kinds": "column_types",
    "shares_of_rows": "row_fractions",
    "shown": "primary_metrics",
    "stock": "model_class",
    "tune": "tune_thresholds",
}
"""Old member of a custom task, of its inputs, target or metrics -> new member."""
RECORD_KEYS = {
    "backbone_trained": "backbone_trainable",
    "beside": "text_source",
    "classic_head": "sklearn_head",
    "dearest": "most_expensive",
    "licence": "license",
    "shown": "primary_metrics",
    "spared": "cost_saving",
    "stock": "model_class",
    "trained": "trainable",
    "verdict": "conclusion",
}
"""Old key of report.json, compare.json and hftl.json -> new key."""
_AS_IS = ("state", "classes", "rows", "left_out")
"""Keys whose content names columns, classes and rows of the data, which no rename may touch."""


def renamed_setting(setting: str, value: str = "") -> str:
    """Returns what an unknown setting, or an unknown value of a setting, is called now; empty if nothing changed."""
    if setting in SETTINGS:
        return f"{setting} was renamed to {SETTINGS[setting]}"
    new = VALUES.get((setting, value))
    return f"{setting}: '{value}' was renamed to '{new}'" if new else ""


def upgrade_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted name with old names and values replaced."""
    out = {}
    for name, value in values.items():
        setting = SETTINGS.get(name, name)
        out[setting] = VALUES.get((setting, value), value) if isinstance(value, str) else value
    return out


def upgrade_record(record: Any) -> Any:
    """Returns the content of a JSON file of a run folder or saved model with old keys replaced, at any depth."""
    if isinstance(record, list):
        return [upgrade_record(value) for value in record]
    if not isinstance(record, dict):
        return record
    return {
        RECORD_KEYS.get(key, key): value if key in _AS_IS else upgrade_record(value) for key, value in record.items()
    }


def renamed_members(parts: Iterable[Any]) -> list[str]:
    """Returns one problem for each old member name in a custom task, its inputs, target or metrics.

    Such a member would be ignored silently: hftl asks for the new name only.

    Args:
        parts: Objects, or classes of them.
    """
    return [
        f"task: {getattr(part, '__name__', type(part).__name__)}.{old} was renamed to {new}. Rename it."
        for part in parts
        for old, new in MEMBERS.items()
        if hasattr(part, old)
    ]
