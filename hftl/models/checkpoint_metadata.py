"""Metadata files of a text checkpoint, in a folder or on the Hub: pooling, model card, JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hftl.config.schema import ModelConfig
from hftl.errors import nearest
from hftl.hub_client import cached_commit
from hftl.models.task_model import Source


def resolve_pooling(config: ModelConfig) -> tuple[str, str]:
    """Returns the pooling of token features (`default`, `cls` or `mean`) and the reason for this choice."""
    if config.pooling != "auto":
        return config.pooling, "model.pooling"
    pooling_config = read_checkpoint_json(config, "1_Pooling/config.json")
    if pooling_config is None:
        return "default", "no 1_Pooling in the checkpoint"
    mode = pooling_config.get("pooling_mode")
    if pooling_config.get("pooling_mode_mean_tokens") or mode == "mean":
        return "mean", "from 1_Pooling of the checkpoint"
    if pooling_config.get("pooling_mode_cls_token") or mode == "cls":
        return "cls", "from 1_Pooling of the checkpoint"
    return "default", "1_Pooling of the checkpoint has an unsupported mode"


def read_checkpoint_json(config: ModelConfig, file: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file of the checkpoint; None if the file is missing or holds another type."""
    path = checkpoint_file(config, file)
    content = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    return content if isinstance(content, dict) else None


def checkpoint_file(config: ModelConfig, file: str) -> str | None:
    """Returns the local path of a file of the checkpoint, downloaded if needed; None if it is missing."""
    from transformers.utils import cached_file

    return cached_file(
        config.name,
        file,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if the checkpoint name is invalid, else None. Uses no network."""
    name = config.name
    path = Path(name).expanduser()
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"model.name: folder '{name}' has no config.json."
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"model.name: folder '{name}' does not exist.{nearest(path.name, siblings)}"
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"model.name: '{name}' is neither a folder nor a repo id: {error}"
    return None


def checkpoint_source(config: ModelConfig) -> Source:
    """Returns the origin of the checkpoint, with license and language from its model card."""
    from huggingface_hub import ModelCard

    hub_id = None if Path(config.name).expanduser().is_dir() else config.name
    revision = config.revision or (cached_commit(hub_id, None) if hub_id else None)
    card = checkpoint_file(config, "README.md")
    try:
        metadata = ModelCard.load(card).data.to_dict() if card else {}
    except ValueError:  # the metadata block of the card is invalid
        metadata = {}
    license = metadata.get("license") if isinstance(metadata.get("license"), str) else None
    return Source(config.name, revision, config.pretrained, "transformers", hub_id, license, metadata.get("language"))
