"""Broken inputs: settings, models and data of every task that setup rejects, with the settings that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .cells import (
    BERT,
    BOXES,
    CAPTIONS,
    IMAGE,
    IMAGES,
    LABELED,
    LISTED,
    MASKS,
    MIXED,
    PAIRS,
    PROBE,
    ROWS,
    TAGS,
    TEXT,
    TEXTS,
    VIT,
    make_cell,
)
from .material import WORDS, np, write_lines

QUESTIONS = {"data.source": "{material}/questions", "model.name": BERT}
DIGITS = {"data.source": "embedded:digits", "model.name": "embedded:letters", "data.max_train_samples_per_class": 4}
NESTED, NUMBERS = IMAGES | {"data.source": "{broken}/unreadable/nested"}, LISTED | {"data.label_column": "length"}
TAGGING, ANSWERS, EMBEDDING = "token_classification", "question_answering", "text_embedding"
SEGMENTATION, DETECTION, RETRIEVAL = "semantic_segmentation", "object_detection", "image_text_retrieval"

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lr_is_text": (IMAGE, IMAGES | {"train.lr": "fast"}),
    "lr_is_negative": (TEXT, TEXTS | {"train.lr": -1.0}),
    "lr_is_infinite": (IMAGE, IMAGES | {"train.head_lr": "inf"}),
    "setting_of_another_library": (IMAGE, IMAGES | {"train.learning_rate": 0.1}),
    "setting_in_another_group": (TEXT, TEXTS | {"optimizer.weight_decay": 0.1}),
    "setting_unknown": (TAGGING, TAGS | {"data.sauce": "x"}),
    "group_is_a_value": (IMAGE, IMAGES | {"adapt": 3}),
    "warmup_out_of_range": (IMAGE, IMAGES | {"train.warmup_ratio": 1.5}),
    "frozen_fraction_out_of_range": (IMAGE, IMAGES | {"train.freeze_backbone_ratio": 1.0}),
    "seed_is_text": (ANSWERS, QUESTIONS | {"train.seed": "x"}),
    "method_unknown": (IMAGE, IMAGES | {"adapt.method": "lorra"}),
    "pooling_unknown": (TEXT, TEXTS | {"model.pooling": "men"}),
    "schedule_unknown": (TEXT, TEXTS | {"train.lr_scheduler_type": "linaer"}),
    "batch_is_zero": (IMAGE, IMAGES | {"train.batch_size_per_device": 0}),
    "batch_exceeds_rows": (IMAGE, IMAGES | {"train.batch_size_per_device": 16, "train.gradient_accumulation_steps": 2}),
    "batch_of_one_pair": (EMBEDDING, PAIRS | {"train.pair_loss": "cosent", "train.batch_size_per_device": 1}),
    "best_metric_unknown": (IMAGE, IMAGES | {"train.metric_for_best_model": "macrof1"}),
    "best_metric_of_another_task": (DETECTION, BOXES | {"train.metric_for_best_model": "accuracy"}),
    "metric_unknown": (TEXT, TEXTS | {"train.metrics": ["no_such_metric"]}),
    "metric_for_masks": (SEGMENTATION, MASKS | {"train.metrics": ["accuracy"]}),
    "tracker_unknown": (IMAGE, IMAGES | {"train.trackers": ["tensorbord"]}),
    "augmentation_unknown": (IMAGE, IMAGES | {"data.augment.auto_augment": "nonsense"}),
    "crop_is_zero": (IMAGE, IMAGES | {"data.augment.crop_scale": 0.0}),
    "lora_rank_is_zero": (TEXT, TEXTS | {"adapt.method": "lora", "adapt.lora.r": 0}),
    "lora_layer_unknown": (IMAGE, LABELED | {"adapt.method": "lora", "adapt.lora.target_modules": ["qkw", "fc1"]}),
    "rates_are_empty": (IMAGE, IMAGES | {"adapt.method": "frozen", "adapt.frozen.lr_factors": []}),
    "one_fold": (IMAGE, IMAGES | PROBE | {"adapt.probe.num_folds": 1}),
    "classifier_unknown": (IMAGE, IMAGES | PROBE | {"adapt.probe.classifier": "tree"}),
    "probe_of_embeddings": (EMBEDDING, PAIRS | PROBE),
    "frozen_embeddings": (EMBEDDING, PAIRS | {"adapt.method": "frozen"}),
    "probe_of_tags": (TAGGING, TAGS | PROBE),
    "skipped_fraction_out_of_range": (IMAGE, IMAGES | {"data.max_skipped_fraction": 2.0}),
    "task_of_another_recipe": (IMAGE, IMAGES | {"task": "text_classification"}),
    "task_unknown": ("auto", IMAGES | {"task": "imge_classification"}),
    "resume_and_overwrite": (IMAGE, IMAGES | {"resume": "auto", "overwrite": True}),
    "folder_is_a_file": (IMAGE, IMAGES | {"output_dir": "{broken}/file.txt"}),
    "folder_holds_a_run": (IMAGE, IMAGES | {"output_dir": "{broken}/old_run"}),
    "folder_holds_the_data": (
        IMAGE,
        IMAGES | {"data.source": "{broken}/unreadable/nested", "output_dir": "{broken}/unreadable"},
    ),
    "image_too_small": (IMAGE, IMAGES | {"model.image_size": 4}),
    "detector_width": (DETECTION, BOXES | {"model.detector.d_model": 33}),
    "detector_queries": (DETECTION, BOXES | {"model.detector.num_queries": 1000}),
    "decoder_too_small": (SEGMENTATION, MASKS | {"model.decoder_channels": 4}),
    "fusion_width": (MIXED, ROWS | {"model.fusion_dim": 10}),
    "projection_width": (RETRIEVAL, CAPTIONS | {"model.projection_dim": 0}),
    "encoder_method_unknown": (MIXED, ROWS | {"adapt.image_method": "probe"}),
    "encoder_method_without_encoders": (TEXT, TEXTS | {"adapt.text_method": "frozen"}),
    "repository_name": (IMAGE, IMAGES | {"hub.repo_id": "a/b/c"}),
    "no_checkpoints_kept": (IMAGE, IMAGES | {"checkpoint.total_limit": 0}),
    "nothing_named": (TEXT, {"data.source": "", "model.name": ""}),
    "file_of_settings": (IMAGE, IMAGES | {"config": "{broken}/wrong.yaml"}),
    "file_is_not_yaml": (IMAGE, IMAGES | {"config": "{broken}/not.yaml"}),
    "stride_is_negative": (ANSWERS, QUESTIONS | {"data.stride": -1}),
    "digits_without_column": ("custom_task", DIGITS | {"data.image_column": "picture"}),
    "digits_too_many_rows": ("custom_task", DIGITS | {"train.batch_size_per_device": 64}),
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm_unknown": (IMAGE, IMAGES | {"model.name": "resnet5O"}),
    "timm_weights_unknown": (IMAGE, IMAGES | {"model.name": "resnet18.a1_in1kk"}),
    "timm_folder_missing": (IMAGE, IMAGES | {"model.name": "local-dir:no/such/folder"}),
    "timm_folder_without_prefix": (IMAGE, IMAGES | {"model.name": "{material}/models/resnet"}),
    "embedded_unknown": ("custom_task", DIGITS | {"model.name": "embedded:leters"}),
    "prefix_unknown": (IMAGE, IMAGES | {"model.name": "hub:timm/resnet18"}),
    "bert_folder_missing": (TEXT, TEXTS | {"model.name": "{material}/models/brt"}),
    "bert_folder_without_config": (TAGGING, TAGS | {"model.name": "{broken}/empty"}),
    "bert_is_not_a_name": (EMBEDDING, PAIRS | {"model.name": "not a name!"}),
    "answers_pooled": (ANSWERS, QUESTIONS | {"model.pooling": "mean"}),
    "tags_pooled": (TAGGING, TAGS | {"model.pooling": "cls"}),
    "detector_of_a_transformer": (DETECTION, BOXES | {"model.name": VIT}),
    "text_encoder_missing": (MIXED, ROWS | {"model.text_name": ""}),
    "text_encoder_unknown": (RETRIEVAL, CAPTIONS | {"model.text_name": "{material}/models/brt"}),
    "image_encoder_unknown": (MIXED, ROWS | {"model.name": "tset_resnet"}),
}

DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "folder_missing": (IMAGE, IMAGES | {"data.source": "{material}/imagse"}),
    "embedded_data_unknown": ("custom_task", DIGITS | {"data.source": "embedded:digit"}),
    "file_type": (TEXT, TEXTS | {"data.source": "{broken}/file.txt"}),
    "folder_empty": (IMAGE, IMAGES | {"data.source": "{broken}/empty"}),
    "images_unreadable": (IMAGE, IMAGES | {"data.source": "{broken}/unreadable"}),
    "images_without_classes": (IMAGE, IMAGES | {"data.source": "{material}/images/train/red"}),
    "image_files_missing": (MIXED, ROWS | {"data.source": "{broken}/missing_files"}),
    "columns_missing": (TEXT, TEXTS | {"data.text_column": "texts", "data.label_column": "lable"}),
    "pair_column_missing": (TEXT, TEXTS | {"data.text_pair_column": "secnd"}),
    "text_columns_ambiguous": (TEXT, {"data.source": "{broken}/text_columns_ambiguous", "model.name": BERT}),
    "label_columns_twice": (TEXT, TEXTS | {"data.label_columns": ["length", "weight"]}),
    "labels_missing": (TEXT, TEXTS | {"data.source": "{broken}/labels_missing"}),
    "one_class": (TEXT, TEXTS | {"data.source": "{broken}/one_class"}),
    "class_unseen": (TEXT, TEXTS | {"data.source": "{broken}/class_unseen"}),
    "numbers_as_classes": (TEXT, NUMBERS | {"data.problem_type": "single_label_classification"}),
    "words_as_numbers": (TEXT, TEXTS | {"data.problem_type": "regression"}),
    "number_missing": (TEXT, NUMBERS | {"data.source": "{broken}/number_missing"}),
    "texts_empty": (TEXT, TEXTS | {"data.source": "{broken}/texts_empty"}),
    "too_few_rows": (TEXT, TEXTS | {"data.source": "{broken}/too_few_rows"}),
    "tags_of_another_length": (TAGGING, TAGS | {"data.source": "{broken}/tags_of_another_length"}),
    "tags_unseen": (TAGGING, TAGS | {"data.source": "{broken}/tags_unseen"}),
    "words_missing": (TAGGING, TAGS | {"data.source": "{broken}/words_missing"}),
    "answers_elsewhere": (ANSWERS, QUESTIONS | {"data.source": "{broken}/answers_elsewhere"}),
    "questions_empty": (ANSWERS, QUESTIONS | {"data.source": "{broken}/questions_empty"}),
    "masks_of_another_size": (SEGMENTATION, MASKS | {"data.source": "{broken}/masks_of_another_size"}),
    "mask_value_unknown": (SEGMENTATION, MASKS | {"data.source": "{broken}/mask_value_unknown"}),
    "boxes_outside": (DETECTION, BOXES | {"data.source": "{broken}/boxes_outside"}),
    "boxes_of_no_class": (DETECTION, BOXES | {"data.source": "{broken}/boxes_of_no_class"}),
    "score_missing": (EMBEDDING, PAIRS | {"data.source": "{broken}/score_missing"}),
    "loss_of_other_pairs": (EMBEDDING, PAIRS | {"train.pair_loss": "infonce"}),
    "loss_of_captions": (RETRIEVAL, CAPTIONS | {"train.pair_loss": "cosine"}),
    "pair_empty": (EMBEDDING, PAIRS | {"data.source": "{broken}/pair_empty"}),
    "captions_empty": (RETRIEVAL, CAPTIONS | {"data.source": "{broken}/captions_empty"}),
    "number_is_text": (MIXED, ROWS | {"data.numeric_columns": ["shop"]}),
    "template_column_missing": (MIXED, ROWS | {"data.text_template": "{titel}"}),
}  # fmt: skip

BROKEN = SETTINGS | MODELS | DATA
SMALL = {
    "data.num_workers": 0,
    "model.detector.num_queries": 10,
    "train.batch_size_per_device": 8,
    "train.max_steps": 1,
    "train.trackers": [],
}
"""Settings of every broken input. Parsing costs seconds where a flag is wrong and there are many, so there are few."""


def make_broken(places: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the cells of `BROKEN`."""
    return [make_cell(name, recipe, SMALL | settings, places) for name, (recipe, settings) in BROKEN.items()]


def write_broken(material: Path, folder: Path) -> None:
    """Writes the broken datasets and files, each a small change of one of `material`."""
    (folder / "empty").mkdir(parents=True)
    (folder / "file.txt").write_text("text")
    (folder / "old_run").mkdir()
    (folder / "old_run" / "config.yaml").write_text("")
    (folder / "wrong.yaml").write_text("train: {lr: fast, epochs: 3, warmup_ratio: 1.5}\n")
    (folder / "not.yaml").write_text("train: {lr: [\n")
    for name, (source, split, change) in TABLES.items():
        shutil.copytree(material / source, folder / name)
        file = folder / name / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_lines(folder / name, split, [row | change(row, number) for number, row in enumerate(rows)])
    write_lines(folder / "too_few_rows", "train", [{"text": "the cow", "label": "animal"}])
    rows = [{"title": f"the {kind} {number}", "body": "a", "label": kind} for number in range(8) for kind in WORDS]
    write_lines(folder / "text_columns_ambiguous", "train", rows)
    write_broken_images(material, folder)


# by name: the table, the split, and what a row gets
TABLES: dict[str, tuple[str, str, Any]] = {
    "labels_missing": ("texts", "train", lambda row, number: {"label": None} if number < 2 else {}),
    "one_class": ("texts", "train", lambda row, number: {"label": "animal"}),
    "class_unseen": ("texts", "test", lambda row, number: {"label": "plant"} if number == 3 else {}),
    "number_missing": ("texts", "train", lambda row, number: {"length": None} if number == 1 else {}),
    "texts_empty": ("texts", "validation", lambda row, number: {"text": "  "} if number in (1, 4) else {}),
    "tags_of_another_length": ("tags", "train", lambda row, number: {"tags": row["tags"][1:]} if number == 5 else {}),
    "tags_unseen": ("tags", "test", lambda row, number: {"tags": ["B-plant", *row["tags"][1:]]} if number == 0 else {}),
    "words_missing": ("tags", "train", lambda row, number: {"tokens": [], "tags": []} if number == 3 else {}),
    "answers_elsewhere": (
        "questions",
        "train",
        lambda row, number: {"answers": {"text": ["plant"], "answer_start": [0]}} if number == 2 else {},
    ),
    "questions_empty": ("questions", "test", lambda row, number: {"question": ""} if number == 1 else {}),
    "score_missing": ("scored_pairs", "train", lambda row, number: {"score": None} if number == 1 else {}),
    "pair_empty": ("scored_pairs", "train", lambda row, number: {"sentence2": ""} if number == 1 else {}),
    "captions_empty": ("captions", "train", lambda row, number: {"captions": []} if number == 1 else {}),
    "missing_files": ("mixed", "train", lambda row, number: {"image": "files/none.png"} if number == 1 else {}),
}


def write_broken_images(material: Path, folder: Path) -> None:
    """Writes unreadable images, masks of another size or value, and boxes that are wrong."""
    from PIL import Image

    shutil.copytree(material / "images", folder / "unreadable")
    (folder / "unreadable" / "train" / "red" / "03.png").write_bytes(b"")
    (folder / "unreadable" / "test" / "blue" / "00.png").write_text("not an image")
    shutil.copytree(material / "images", folder / "unreadable" / "nested")
    for name, change in {"masks_of_another_size": (20, 20), "mask_value_unknown": (30, 44)}.items():
        shutil.copytree(material / "masks", folder / name)
        values = np.full(change, 0 if change == (20, 20) else 9, np.uint8)
        Image.fromarray(values).save(folder / name / "train" / "masks" / "00.png")
    for name, change in {"boxes_outside": {"bbox": [80, 60, 20, 20]}, "boxes_of_no_class": {"category_id": 5}}.items():
        shutil.copytree(material / "boxes", folder / name)
        file = folder / name / "train.coco.json"
        content = json.loads(file.read_text())
        content["annotations"][0] |= change
        file.write_text(json.dumps(content))
