"""Allowed values of settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hftl.config.schema import RunConfig, leaves
from hftl.errors import nearest

_RANGES: dict[str, tuple[float, float, str]] = {
    "data.augment.crop_scale": (1e-6, 1, "(0, 1]"),
    "data.augment.hflip": (0, 1, "[0, 1]"),
    "data.augment.color_jitter": (0, float("inf"), "at least 0"),
    "data.validation_fraction": (0, 0.999999, "[0, 1)"),
    "data.max_train_samples_per_class": (1, float("inf"), "at least 1"),
    "data.seed": (0, 2**32 - 1, "0 to 4294967295"),
    "data.max_length": (2, float("inf"), "at least 2 tokens"),
    "data.stride": (0, float("inf"), "at least 0 tokens"),
    "data.max_answer_length": (1, float("inf"), "at least 1 token"),
    "data.num_workers": (0, float("inf"), "at least 0"),
    "data.worker_timeout": (0, float("inf"), "at least 0 seconds"),
    "data.max_pixels": (1, float("inf"), "at least 1"),
    "data.max_skipped_fraction": (0, 1, "[0, 1]"),
    "data.ignore_index": (-1, float("inf"), "at least -1"),
    "model.decoder_channels": (8, float("inf"), "at least 8"),
    "model.detector.num_feature_levels": (1, 3, "1 to 3"),
    "model.detector.decoder_layers": (1, float("inf"), "at least 1"),
    "model.detector.num_queries": (1, float("inf"), "at least 1"),
    "model.dropout": (0, 0.999999, "[0, 1)"),
    "model.fusion_dim": (4, float("inf"), "a multiple of 4"),
    "model.modality_dropout": (0, 0.999999, "[0, 1)"),
    "model.projection_dim": (1, float("inf"), "at least 1"),
    "adapt.lora.r": (1, float("inf"), "at least 1"),
    "adapt.lora.alpha": (1e-12, float("inf"), "above 0"),
    "adapt.lora.dropout": (0, 0.999999, "[0, 1)"),
    "adapt.frozen.num_views": (0, float("inf"), "at least 0"),
    "adapt.frozen.num_seeds": (1, float("inf"), "at least 1"),
    "adapt.probe.num_folds": (2, float("inf"), "at least 2"),
    "train.num_epochs": (1e-9, float("inf"), "above 0"),
    "train.max_steps": (1, float("inf"), "at least 1"),
    "train.lr": (0, float("inf"), "at least 0"),
    "train.head_lr": (0, float("inf"), "at least 0"),
    "train.freeze_backbone_ratio": (0, 0.999999, "[0, 1)"),
    "train.weight_decay": (0, float("inf"), "at least 0"),
    "train.batch_size_per_device": (1, float("inf"), "at least 1"),
    "train.gradient_accumulation_steps": (1, float("inf"), "at least 1"),
    "train.max_grad_norm": (0, float("inf"), "at least 0"),
    "train.warmup_ratio": (0, 1, "[0, 1]"),
    "train.seed": (0, 2**32 - 1, "0 to 4294967295"),
    "train.eval_steps": (1, float("inf"), "at least 1"),
    "train.logging_steps": (1, float("inf"), "at least 1"),
    "train.early_stopping_patience": (1, float("inf"), "at least 1"),
    "train.max_nonfinite_steps": (1, float("inf"), "at least 1"),
    "train.num_threads": (1, 4096, "1 to 4096"),
    "train.timeout_minutes": (1e-3, float("inf"), "above 0"),
    "checkpoint.save_minutes": (1e-9, float("inf"), "above 0"),
    "checkpoint.save_steps": (1, float("inf"), "at least 1"),
    "checkpoint.total_limit": (1, float("inf"), "at least 1"),
}

_LISTS: dict[str, tuple[float, str]] = {
    "adapt.frozen.lr_factors": (1e-12, "a list of at least one number, each above 0"),
    "adapt.frozen.weight_decays": (0.0, "a list of at least one number, each at least 0"),
}

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "train.pair_loss": ("auto", "cosine", "cosent", "infonce", "siglip"),
    "model.pooling": ("auto", "default", "cls", "mean"),
    "model.fusion": ("concat", "gated", "cross_attention"),
    "adapt.method": ("full", "frozen", "lora", "probe"),
    "adapt.image_method": (None, "full", "frozen", "lora"),
    "adapt.text_method": (None, "full", "frozen", "lora"),
    "adapt.probe.classifier": ("logistic", "linear_svm", "svm", "random_forest", "knn", "ridge", "lda"),
    "adapt.batch_norm": ("auto", "frozen", "train"),
    "train.lr_scheduler_type": ("linear", "cosine", "constant"),
    "train.on_nonfinite": ("stop", "skip"),
    "train.on_oom": ("halve", "raise"),
    "data.problem_type": ("auto", "single_label_classification", "multi_label_classification", "regression"),
    "data.on_error": ("raise", "skip"),
    "resume": ("never", "auto"),
}


def _value_problems(values: dict[str, Any]) -> Iterator[str]:
    for name in ("data.source", "model.name"):
        if not values[name]:
            yield f"{name}: is empty. Set --{name}."
    for name, (low, high, allowed) in _RANGES.items():
        value = values[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{name}: {value!r} is not a number; allowed: {allowed}."
        elif not low <= value <= high or value == float("inf"):
            yield f"{name}: {value} is out of range; allowed: {allowed}."
    size = values["model.image_size"]
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    if size is not None and not all(type(side) is int and side >= 8 for side in sides):
        yield f"model.image_size: {size!r} is out of range; allowed: side or [height, width], at least 8 pixels each."
    if values["model.detector.d_model"] < 32 or values["model.detector.d_model"] % 32:
        yield f"model.detector.d_model: {values['model.detector.d_model']} is out of range; allowed: 32, 64, 96, …"
    for name, (low, allowed) in _LISTS.items():
        value = values[name]
        is_valid = isinstance(value, (list, tuple)) and bool(value)
        is_valid = is_valid and all(isinstance(each, (int, float)) and low <= each < float("inf") for each in value)
        if value is not None and not is_valid:
            yield f"{name}: {value!r} is invalid; allowed: {allowed}."
    if isinstance(values["model.fusion_dim"], int) and values["model.fusion_dim"] % 4:
        yield f"model.fusion_dim: {values['model.fusion_dim']} is invalid; allowed: multiples of 4 (attention heads)."
    for name, allowed in _CHOICES.items():
        if values[name] not in allowed:
            choices = [choice for choice in allowed if choice is not None]
            guess = nearest(str(values[name]), choices)
            yield f"{name}: {values[name]!r} is invalid; allowed: {', '.join(choices)}.{guess}"


def value_problems(run: RunConfig) -> list[str]:
    """Returns one error message for each invalid value in `run`."""
    return list(_value_problems(leaves(run)))
