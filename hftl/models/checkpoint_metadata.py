"""What stands beside a text checkpoint: how it pools, its license; in a folder or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hftl.config.schema import ModelConfig
from hftl.errors import nearest
from hftl.hub_client import cached_commit
from hftl.models.task_model import Source


def pooling_of(config: ModelConfig) -> tuple[str, str]:
    """Returns how features are read (`stock`, `cls` or `mean`), and why."""
    if config.pooling != "auto":
        return config.pooling, "model.pooling"
    declared = read_json(config, "1_Pooling/config.json")
    if declared is None:
        return "default", "the checkpoint does not say how it pools"
    mode = declared.get("pooling_mode")
    if declared.get("pooling_mode_mean_tokens") or mode == "mean":
        return "mean", "the checkpoint's 1_Pooling says so"
    if declared.get("pooling_mode_cls_token") or mode == "cls":
        return "cls", "the checkpoint's 1_Pooling says so"
    return "default", "the checkpoint's 1_Pooling names a way that hftl does not have"


def read_json(config: ModelConfig, file: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file beside the checkpoint, or None where there is none."""
    path = file_beside(config, file)
    found = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    return found if isinstance(found, dict) else None


def file_beside(config: ModelConfig, file: str) -> str | None:
    """Returns the path of a file beside the checkpoint, or None where there is none."""
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
    """Returns what is wrong with a checkpoint name that needs no network to see; None if nothing."""
    name = config.name
    path = Path(name).expanduser()
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"model.name: '{name}' is a folder without config.json."
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"model.name: the folder '{name}' does not exist.{nearest(path.name, siblings)}"
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"model.name: '{name}' is neither a folder nor a hub id: {error}"
    return None


def source_of(config: ModelConfig) -> Source:
    """Returns where the checkpoint came from, with what its card says of license and language."""
    from huggingface_hub import ModelCard

    hub_id = None if Path(config.name).expanduser().is_dir() else config.name
    revision = config.revision or (cached_commit(hub_id, None) if hub_id else None)
    card = file_beside(config, "README.md")
    try:
        said = ModelCard.load(card).data.to_dict() if card else {}
    except ValueError:  # a card that does not parse says nothing
        said = {}
    license = said.get("license") if isinstance(said.get("license"), str) else None
    return Source(config.name, revision, config.pretrained, "transformers", hub_id, license, said.get("language"))
