"""Pretrained classifier head of a checkpoint, which a task replaces by a new one."""

from __future__ import annotations

from typing import Any

from torch import nn

from hftl.config.schema import ModelConfig
from hftl.models.suppress_warnings import quiet
from hftl.models.timm_model import load_original


def source_head(config: ModelConfig, model_class: str) -> nn.Linear | None:
    """Returns the pretrained head [Z, D] of a checkpoint if it is a single linear layer, else None.

    Its input features are those of the new head. A model with random weights has no pretrained head.

    Args:
        config: Uses name, revision and `pretrained`.
        model_class: See `HeadSpec.model_class`.
    """
    if not config.pretrained:
        return None
    with quiet():
        head = _timm_head(config) if model_class == "timm" else _text_head(config, model_class)
    return head if isinstance(head, nn.Linear) and head.out_features > 1 else None


def _timm_head(config: ModelConfig) -> Any:
    return load_original(config).get_classifier()


def _text_head(config: ModelConfig, model_class: str) -> Any:
    """Returns the only layer with parameters outside the backbone, if the checkpoint has the same kind of head."""
    import transformers
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    suffix = model_class.removeprefix("AutoModel")
    architectures = AutoConfig.from_pretrained(config.name, **options).architectures or []
    if config.trust_remote_code or not any(name.endswith(suffix) for name in architectures):
        return None
    net = getattr(transformers, model_class).from_pretrained(config.name, use_safetensors=True, **options)
    prefix = net.base_model_prefix + "."
    heads = {name.rpartition(".")[0] for name, _ in net.named_parameters() if not name.startswith(prefix)}
    return net.get_submodule(heads.pop()) if len(heads) == 1 else None
