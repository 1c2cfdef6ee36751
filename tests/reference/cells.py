"""The runs of the reference: at least one per task and kind of label, every setting given, 6 steps on CPU.

`{material}` is the folder of `material.write_material`, `{runs}` for the folder of the run folders.
"""

from __future__ import annotations

from typing import Any

# every setting has a value here: a later change of a default changes no cell
BASE: dict[str, Any] = {
    "data.subset": None,
    "data.revision": None,
    "data.image_column": None,
    "data.text_column": None,
    "data.text_pair_column": None,
    "data.label_column": None,
    "data.label_columns": None,
    "data.label_separator": None,
    "data.problem_type": "auto",
    "data.ignore_index": None,
    "data.text_template": None,
    "data.numeric_columns": None,
    "data.categorical_columns": None,
    "data.ignore_columns": [],
    "train.pair_loss": "auto",
    "data.validation_fraction": 0.1,
    "data.max_train_samples_per_class": None,
    "data.seed": 0,
    "data.max_length": None,
    "data.stride": None,
    "data.max_answer_length": 30,
    "data.augment.crop_scale": 0.6,
    "data.augment.hflip": 0.5,
    "data.augment.color_jitter": 0.2,
    "data.augment.auto_augment": None,
    "data.num_workers": 0,
    "data.worker_timeout": 300.0,
    "data.max_pixels": 64000000,
    "data.on_error": "raise",
    "data.max_skipped_fraction": 0.05,
    "model.pretrained": True,
    "model.pooling": "auto",
    "model.revision": None,
    "model.image_size": None,
    "model.decoder_channels": 8,
    "model.dropout": None,
    "model.trust_remote_code": False,
    "model.text_name": "",
    "model.fusion": "concat",
    "model.fusion_dim": 16,
    "model.modality_dropout": 0.0,
    "model.projection_dim": 16,
    "model.detector.d_model": 32,
    "model.detector.num_feature_levels": 2,
    "model.detector.decoder_layers": 2,
    "model.detector.num_queries": 10,
    "adapt.method": "full",
    "adapt.lora.r": 4,
    "adapt.lora.alpha": 8.0,
    "adapt.lora.dropout": 0.0,
    "adapt.lora.target_modules": None,
    "adapt.frozen.cache": True,
    "adapt.frozen.num_views": 0,
    "adapt.frozen.lr_factors": [0.3, 1.0, 3.0],
    "adapt.frozen.weight_decays": None,
    "adapt.frozen.num_seeds": 1,
    "adapt.probe.classifier": "logistic",
    "adapt.probe.num_folds": 3,
    "adapt.batch_norm": "auto",
    "adapt.image_method": None,
    "adapt.text_method": None,
    "train.num_epochs": 3,
    "train.max_steps": 6,
    "train.lr": 0.001,
    "train.head_lr": 0.01,
    "train.freeze_backbone_ratio": 0.0,
    "train.weight_decay": 0.01,
    "train.batch_size_per_device": 8,
    "train.gradient_accumulation_steps": 1,
    "train.max_grad_norm": 1.0,
    "train.warmup_ratio": 0.1,
    "train.lr_scheduler_type": "linear",
    "train.seed": 0,
    "train.eval_steps": 3,
    "train.logging_steps": 1,
    "train.metric_for_best_model": None,
    "train.metrics": [],
    "train.early_stopping_patience": None,
    "train.trackers": [],
    "train.on_nonfinite": "stop",
    "train.max_nonfinite_steps": 10,
    "train.on_oom": "halve",
    "train.timeout_minutes": 10.0,
    "checkpoint.save_minutes": None,
    "checkpoint.save_steps": None,
    "checkpoint.total_limit": 2,
    "hub.repo_id": None,
    "hub.private": False,
    "hub.verify": True,
    "task": "auto",
    "overwrite": False,
    "resume": "never",
}

RESNET, VIT, BERT = "local-dir:{material}/models/resnet", "local-dir:{material}/models/vit", "{material}/models/bert"
PLAIN = "local-dir:{material}/models/plain_resnet"
IMAGE, TEXT, MIXED = "image_classification", "text_classification", "image_text_classification"
IMAGES = {"data.source": "{material}/images", "model.name": RESNET}
LABELED = {"data.source": "{material}/image_labels", "model.name": VIT}
TEXTS = {
    "data.source": "{material}/texts",
    "data.text_column": "text",
    "data.label_column": "label",
    "model.name": BERT,
    "model.dropout": 0.1,
}
LISTED = TEXTS | {"data.text_column": "listed"}
TAGS = {"data.source": "{material}/tags", "model.name": BERT}
PAIRS = {"data.source": "{material}/scored_pairs", "model.name": BERT}
MASKS = {"data.source": "{material}/masks", "model.name": PLAIN, "model.image_size": [32, 48]}
BOXES = {"data.source": "{material}/boxes", "model.name": PLAIN, "model.image_size": [64, 64]}
TWO_ENCODERS = {"model.name": RESNET, "model.text_name": BERT}
ROWS = {"data.source": "{material}/mixed", "data.label_column": "label"} | TWO_ENCODERS
CAPTIONS = {"data.source": "{material}/captions"} | TWO_ENCODERS
ACCUMULATED = {"train.batch_size_per_device": 4, "train.gradient_accumulation_steps": 2}
LORA = {"adapt.method": "lora", "adapt.lora.dropout": 0.1}
FROZEN = {"adapt.method": "frozen", "train.lr": 0.0}
PROBE = {"adapt.method": "probe"} | dict.fromkeys(
    (
        "train.num_epochs",
        "train.max_steps",
        "train.lr",
        "train.head_lr",
        "train.freeze_backbone_ratio",
        "train.eval_steps",
    )
)
SCRATCH = {"model.pretrained": False}

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "image_full": (
        IMAGE,
        IMAGES | ACCUMULATED | {"train.trackers": ["tensorboard"], "train.freeze_backbone_ratio": 0.5},
    ),
    "image_lora": (IMAGE, IMAGES | LORA | {"train.lr_scheduler_type": "cosine"}),
    "image_frozen_cached": (IMAGE, IMAGES | FROZEN | {"adapt.frozen.num_views": 2}),
    "image_frozen_loop": (IMAGE, IMAGES | FROZEN | {"adapt.frozen.cache": False}),
    "image_probe_logistic": (IMAGE, IMAGES | PROBE),
    "image_probe_knn": (IMAGE, IMAGES | PROBE | {"adapt.probe.classifier": "knn"}),
    "image_scratch": (IMAGE, IMAGES | SCRATCH | ACCUMULATED | {"adapt.batch_norm": "train"}),
    "image_multi_label": (IMAGE, LABELED | {"data.label_column": "labels", "data.label_separator": "|"}),
    "image_several_numbers": (IMAGE, LABELED | {"data.label_columns": ["count", "total"]}),
    "image_split_and_states": (
        IMAGE,
        IMAGES
        | {"data.source": "{material}/images/train", "data.max_train_samples_per_class": 6, "checkpoint.save_steps": 2},
    ),
    "text_full": (TEXT, TEXTS | ACCUMULATED | {"model.pooling": "default"}),
    "text_pooled": (
        TEXT,
        TEXTS | {"model.pooling": "mean", "train.metrics": [], "train.metric_for_best_model": "loss"},
    ),
    "text_lora": (TEXT, TEXTS | LORA | ACCUMULATED),
    "text_frozen_cached": (TEXT, TEXTS | FROZEN | {"model.pooling": "mean", "model.dropout": None}),
    "text_probe_ridge": (TEXT, TEXTS | PROBE | {"adapt.probe.classifier": "ridge", "model.pooling": "mean"}),
    "text_scratch": (TEXT, TEXTS | SCRATCH | {"train.lr_scheduler_type": "constant"}),
    "text_pair": (TEXT, TEXTS | {"data.text_pair_column": "second"}),
    "text_multi_label": (TEXT, LISTED | {"data.label_column": "kinds"}),
    "text_regression": (TEXT, LISTED | {"data.label_column": "length"}),
    "text_several_numbers": (
        TEXT,
        LISTED | {"data.label_column": None, "data.label_columns": ["length", "weight"], "model.pooling": "mean"},
    ),
    "tags_full": ("token_classification", TAGS | ACCUMULATED),
    "tags_lora": ("token_classification", TAGS | LORA),
    "answers_full": ("question_answering", {"data.source": "{material}/questions", "model.name": BERT} | ACCUMULATED),
    "embedding_scored": ("text_embedding", PAIRS | ACCUMULATED | {"train.pair_loss": "cosine"}),
    "embedding_order": ("text_embedding", PAIRS | LORA | {"train.pair_loss": "cosent"}),
    "embedding_positive": ("text_embedding", PAIRS | {"data.source": "{material}/positive_pairs"}),
    "embedding_triplets": ("text_embedding", PAIRS | {"data.source": "{material}/triplets"}),
    "masks_full": ("semantic_segmentation", MASKS | {"train.batch_size_per_device": 4}),
    "masks_frozen": ("semantic_segmentation", MASKS | FROZEN | {"train.batch_size_per_device": 4}),
    "boxes_full": ("object_detection", BOXES | {"train.batch_size_per_device": 4, "train.head_lr": 0.001}),
    "rows_full": (MIXED, ROWS | ACCUMULATED | {"model.fusion": "gated", "model.modality_dropout": 0.25}),
    "rows_by_encoder": (
        MIXED,
        ROWS | {"adapt.image_method": "frozen", "adapt.text_method": "lora", "model.fusion": "cross_attention"},
    ),
    "captions_infonce": ("image_text_retrieval", CAPTIONS),
    "captions_siglip": ("image_text_retrieval", CAPTIONS | {"train.pair_loss": "siglip"} | ACCUMULATED),
    "custom_task": (
        "custom_task",
        {"data.source": "embedded:digits", "data.max_train_samples_per_class": 4, "model.name": "embedded:letters"}
        | {"data.augment.crop_scale": 1.0, "data.augment.hflip": 0.0},
    ),
    "auto": ("auto", IMAGES),
}


def as_flag(value: Any) -> str:
    """Returns a value as written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(as_flag, value))}]" if isinstance(value, list) else str(value)


def make_cell(name: str, recipe: str, settings: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """Returns a cell for the worker.

    Args:
        name: Name of the cell.
        recipe: File name in `recipes/` without its ending.
        settings: Values by setting.
        places: Folders by the names that values hold in braces; `runs` gets the run folder.
    """
    flags = {key: as_flag(value) for key, value in ({"output_dir": "{runs}/" + name} | settings).items()}
    for place, folder in places.items():
        flags = {key: value.replace("{" + place + "}", folder) for key, value in flags.items()}
    return {"name": name, "recipe": recipe, "flags": flags, "log": f"{places['runs']}/{name}.log"}


def make_runs(places: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the cells of `RUNS` with all settings."""
    return [make_cell(name, recipe, BASE | settings, places) for name, (recipe, settings) in RUNS.items()]
