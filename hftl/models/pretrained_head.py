"""The head that a checkpoint came with: what it was trained to tell apart, before a task gave it a new one."""

from __future__ import annotations

from typing import Any

from torch import nn

from hftl.config.schema import ModelConfig
from hftl.models.suppress_warnings import quiet
from hftl.models.timm_model import load_original


def source_head(config: ModelConfig, model_class: str) -> nn.Linear | None:
    """Returns the checkpoint's own head [Z, D] where it has one and it is a single linear layer, else None.

    It takes the same features as the head that replaces it. Nothing is trained, so random weights have none.

    Args:
        config: Which checkpoint.
        model_class: As `HeadSpec.model_class`.
    """
    if not config.pretrained:
        return None
    with quiet():
        head = _timm_head(config) if model_class == "timm" else _text_head(config, model_class)
    return head if isinstance(head, nn.Linear) and head.out_features > 1 else None


def _timm_head(config: ModelConfig) -> Any:
    return load_original(config).get_classifier()


def _text_head(config: ModelConfig, model_class: str) -> Any:
    """Returns the only layer with parameters outside of the backbone, where the checkpoint is of the stock's kind."""
    import transformers
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    kind = model_class.removeprefix("AutoModel")
    saved = AutoConfig.from_pretrained(config.name, **options).architectures or []
    if config.trust_remote_code or not any(name.endswith(kind) for name in saved):
        return None
    net = getattr(transformers, model_class).from_pretrained(config.name, use_safetensors=True, **options)
    root = net.base_model_prefix + "."
    heads = {name.rpartition(".")[0] for name, _ in net.named_parameters() if not name.startswith(root)}
    return net.get_submodule(heads.pop()) if len(heads) == 1 else None
