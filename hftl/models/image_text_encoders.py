"""Where the two encoders of an image-text model come from: their names, their weights, what is recorded of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import HftlError, ModelError, first_line, shorten
from hftl.logging import log
from hftl.models import timm_files
from hftl.models.checkpoint_metadata import name_problem as text_name_problem
from hftl.models.checkpoint_metadata import pooling_of, read_json
from hftl.models.remote_code import check_files
from hftl.models.task_model import HeadSpec
from hftl.models.text_model import set_dropout
from hftl.models.timm_files import data_config_of

_NOT_OF_BACKBONE = ("id2label", "label2id", "architectures", "auto_map", "problem_type")


def name_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with the names of both encoders, seen without building anything; None if nothing.

    Where only one is named, it depends on the data which one that is: see `spec_problem`.
    """
    return (timm_files.name_problem(config) or _text_problem(config)) if config.text_name else None


def spec_problem(config: ModelConfig, spec: HeadSpec) -> str | None:
    """Returns what is wrong with the names for what the data hold; None if nothing."""
    has_image, has_text = has_inputs(spec)
    lacking = spec.options.get("incomplete", {})
    if lacking and not config.modality_dropout:
        counts = " and ".join(f"{count} row(s) without {what}" for what, count in lacking.items())
        return (
            f"model.modality_dropout: the data have {counts}; a model learns to do without where it is above 0: say "
            "--model.modality_dropout 0.2, or leave these rows out."
        )
    if has_image and has_text and not config.text_name:
        return (
            "model.text_name is empty: model.name is the image encoder; say which checkpoint reads the texts, "
            "--model.text_name ID or FOLDER, or leave the column out with --data.ignore_columns."
        )
    if has_text and not has_image:
        return _text_problem(config)
    return timm_files.name_problem(config)


def has_inputs(spec: HeadSpec) -> tuple[bool, bool]:
    """Whether the data hold images and texts."""
    return spec.options.get("image", True), spec.options.get("text", True)


def _text_problem(config: ModelConfig) -> str | None:
    problem = text_name_problem(text_config(config))
    return problem and problem.replace("model.name:", "model.text_name:")


def text_config(config: ModelConfig) -> ModelConfig:
    """Returns the text encoder as a model of its own. Code that a repository brings cannot go where our model goes."""
    return replace(config, name=config.text_name or config.name, trust_remote_code=False)


def text_encoder(config: ModelConfig) -> tuple[Any, str]:
    """Returns the text encoder without a pooler, and how its tokens are pooled."""
    from transformers import AutoConfig, AutoModel

    of_text = text_config(config)
    name = of_text.name
    options: dict[str, Any] = {"revision": of_text.revision, "trust_remote_code": False}
    try:
        check_files(of_text, lambda file: read_json(of_text, file))
        pooling, why = pooling_of(of_text)
        if pooling == "default":
            pooling, why = "mean", f"{why}; model.pooling cls is the other way"
        log(f"model: text features of {name} by {pooling} ({why})")
        net_config = AutoConfig.from_pretrained(name, **options)
        if config.dropout is not None:
            set_dropout(net_config, config.dropout)
        if not config.pretrained:
            net: Any = AutoModel.from_config(net_config, trust_remote_code=False)
        else:
            options |= {"config": net_config, "use_safetensors": True, "output_loading_info": True}
            net, info = AutoModel.from_pretrained(name, **options)
            lost = [key for key in info["missing_keys"] if "pooler" not in key]
            if lost:
                raise ModelError(f"model.text_name: '{name}' lacks weights of its encoder: {shorten(sorted(lost), 4)}.")
    except HftlError as error:
        raise ModelError(*(problem.replace("model.name:", "model.text_name:") for problem in error.problems)) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.text_name: '{name}' cannot be built as a text encoder: {type(error).__name__}: {first_line(error)}"
        ) from error
    if getattr(net, "pooler", None) is not None:
        net.pooler = None
    return net.float(), pooling


def configuration(run: RunConfig, spec: HeadSpec, image: Any, text: Any, pooling: str) -> Any:
    """Returns the configuration of the class that `spec` names, with these encoders (None where there is none)."""
    from hftl.models import modeling_image_text

    kind = getattr(modeling_image_text, spec.model_class).config_class
    config, vision, backbone = run.model, None, None
    if image is not None:
        data = data_config_of(image, config.image_size)
        vision = {
            "architecture": image.pretrained_cfg["architecture"],
            "arguments": image.hftl_build_args,
            "data": {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        }
    if text is not None:
        backbone = {key: value for key, value in text.config.to_dict().items() if key not in _NOT_OF_BACKBONE}
    labels = dict(enumerate(spec.labels))
    names: dict[str, Any] = {"num_labels": spec.num_outputs}
    if labels:
        names = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    chosen = {key: spec.options[key] for key in ("numbers", "categories", "objective") if key in spec.options}
    return kind(
        vision=vision,
        text=backbone,
        pooling=pooling,
        fusion=config.fusion,
        fusion_dim=config.fusion_dim,
        fusion_dropout=config.dropout if config.dropout is not None else 0.1,
        modality_dropout=config.modality_dropout,
        projection_dim=config.projection_dim,
        problem_type=spec.problem_type,
        **chosen,
        **names,
    )
