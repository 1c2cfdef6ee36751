"""Encoders of image-text models: validation of names, loading of the text encoder, model configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import HftlError, ModelError, first_line, shorten
from hftl.logging import log
from hftl.models import timm_files
from hftl.models.checkpoint_metadata import name_problem as text_name_problem
from hftl.models.checkpoint_metadata import read_checkpoint_json, resolve_pooling
from hftl.models.remote_code import check_files
from hftl.models.task_model import HeadSpec
from hftl.models.text_model import set_dropout
from hftl.models.timm_files import data_config_of

_HEAD_KEYS = ("id2label", "label2id", "architectures", "auto_map", "problem_type")


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if an encoder name is invalid, else None. Builds nothing.

    If `model.text_name` is empty, the data decide whether `model.name` is the image or the text encoder: see
    `spec_problem`.
    """
    return (timm_files.name_problem(config) or _text_problem(config)) if config.text_name else None


def spec_problem(config: ModelConfig, spec: HeadSpec) -> str | None:
    """Returns an error message if the encoder names or settings do not fit the data, else None."""
    has_image, has_text = has_inputs(spec)
    incomplete_rows = spec.options.get("incomplete", {})
    if incomplete_rows and not config.modality_dropout:
        counts = " and ".join(f"{count} row(s) without {modality}" for modality, count in incomplete_rows.items())
        return (
            f"model.modality_dropout: 0, but the data have {counts}. Set --model.modality_dropout 0.2 to train with "
            "missing modalities, or remove these rows."
        )
    if has_image and has_text and not config.text_name:
        return (
            "model.text_name: is empty, but the data have texts and images; model.name is the image encoder. Set "
            "--model.text_name ID or FOLDER for the text encoder, or exclude the texts with --data.ignore_columns."
        )
    if has_text and not has_image:
        return _text_problem(config)
    return timm_files.name_problem(config)


def has_inputs(spec: HeadSpec) -> tuple[bool, bool]:
    """Whether the data contain images, and whether they contain texts."""
    return spec.options.get("image", True), spec.options.get("text", True)


def _text_problem(config: ModelConfig) -> str | None:
    problem = text_name_problem(text_config(config))
    return problem and problem.replace("model.name:", "model.text_name:")


def text_config(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of the text encoder as a separate model, without trust in remote code.

    Remote code is never trusted here, because it is not saved with the image-text model.
    """
    return replace(config, name=config.text_name or config.name, trust_remote_code=False)


def build_text_encoder(config: ModelConfig) -> tuple[Any, str]:
    """Loads the text encoder without its pooler, and returns it with the pooling of its tokens (`mean` or `cls`).

    Raises:
        ModelError: The checkpoint is missing, unsafe, or lacks weights.
    """
    from transformers import AutoConfig, AutoModel

    encoder_config = text_config(config)
    name = encoder_config.name
    options: dict[str, Any] = {"revision": encoder_config.revision, "trust_remote_code": False}
    try:
        check_files(encoder_config, lambda file: read_checkpoint_json(encoder_config, file))
        pooling, reason = resolve_pooling(encoder_config)
        if pooling == "default":
            pooling, reason = "mean", f"{reason}; alternative: model.pooling cls"
        log(f"model: text encoder {name}: {pooling} pooling ({reason})")
        net_config = AutoConfig.from_pretrained(name, **options)
        if config.dropout is not None:
            set_dropout(net_config, config.dropout)
        if not config.pretrained:
            net: Any = AutoModel.from_config(net_config, trust_remote_code=False)
        else:
            options |= {"config": net_config, "use_safetensors": True, "output_loading_info": True}
            net, info = AutoModel.from_pretrained(name, **options)
            missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
            if missing:
                raise ModelError(f"model.text_name: '{name}' lacks weights of its encoder: {shorten(missing, 4)}.")
    except HftlError as error:
        raise ModelError(*(problem.replace("model.name:", "model.text_name:") for problem in error.problems)) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.text_name: '{name}' cannot be built as a text encoder: {type(error).__name__}: {first_line(error)}"
        ) from error
    if getattr(net, "pooler", None) is not None:
        net.pooler = None
    return net.float(), pooling


def build_config(run: RunConfig, spec: HeadSpec, image: Any, text: Any, pooling: str) -> Any:
    """Returns the configuration of the class `spec.model_class`.

    Args:
        run: Uses `run.model`.
        spec: Head of the task.
        image: timm image encoder; None without images.
        text: transformers text encoder; None without texts.
        pooling: Pooling of token features, `mean` or `cls`.
    """
    from hftl.models import modeling_image_text

    config_class = getattr(modeling_image_text, spec.model_class).config_class
    config, vision, text_encoder_config = run.model, None, None
    if image is not None:
        data_config = data_config_of(image, config.image_size)
        vision = {
            "architecture": image.pretrained_cfg["architecture"],
            "arguments": image.hftl_build_args,
            "data": {key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()},
        }
    if text is not None:
        text_encoder_config = {key: value for key, value in text.config.to_dict().items() if key not in _HEAD_KEYS}
    id2label = dict(enumerate(spec.labels))
    label_entries: dict[str, Any] = {"num_labels": spec.num_outputs}
    if id2label:
        label_entries = {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}
    data_entries = {key: spec.options[key] for key in ("numbers", "categories", "objective") if key in spec.options}
    return config_class(
        vision=vision,
        text=text_encoder_config,
        pooling=pooling,
        fusion=config.fusion,
        fusion_dim=config.fusion_dim,
        fusion_dropout=config.dropout if config.dropout is not None else 0.1,
        modality_dropout=config.modality_dropout,
        projection_dim=config.projection_dim,
        problem_type=spec.problem_type,
        **data_entries,
        **label_entries,
    )
