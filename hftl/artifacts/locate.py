"""Location of saved models: a run folder, its model folder, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hftl.config.parse import load_saved_config
from hftl.config.schema import DataConfig
from hftl.data.validation import read_quarantine
from hftl.errors import ArtifactError, nearest
from hftl.hub_client import bounded, explain
from hftl.reporting.run_record import DESCRIPTION

CONFIG = "hftl_config.yaml"
"""Configuration of the run, next to the weights."""


def artifact_folder(path: str | Path) -> Path:
    """Returns the folder that contains the model: `path/model` or `path`.

    Raises:
        ArtifactError: Neither folder was saved by hftl.
    """
    folder = Path(path)
    folder = folder / "model" if (folder / "model" / DESCRIPTION).is_file() else folder
    if not (folder / DESCRIPTION).is_file():
        raise ArtifactError(
            f"'{path}' is not a run folder or model folder of hftl: {DESCRIPTION} is missing there and in model/."
        )
    return folder


def training_data_config(folder: Path) -> DataConfig:
    """Returns the data section of the run that trained the model in `folder`."""
    return load_saved_config(folder / CONFIG).data if (folder / CONFIG).is_file() else DataConfig()


def quarantined_rows(folder: Path) -> dict[str, dict[int, Any]]:
    """Returns the rows quarantined by the training run, by split and row number; empty outside of a run folder."""
    return read_quarantine(folder.parent) if (folder.parent / "config.yaml").is_file() else {}


def locate_model(path_or_repo_id: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """Returns the local folder of a saved model; downloads it if `path_or_repo_id` is a repo id.

    Args:
        path_or_repo_id: Run folder, model folder or repo id.
        revision: Branch, tag or commit of a repo id.
        subfolder: Subfolder of the folder or repository; empty for the top level without `adapter/`.

    Raises:
        ArtifactError: The folder or repository does not exist, or was not saved by hftl.
    """
    path = Path(path_or_repo_id)
    is_path = str(path_or_repo_id).startswith((".", "/", "~")) or str(path_or_repo_id).count("/") > 1
    if is_path or path.exists():
        return path.expanduser() / subfolder
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, prefix = str(path_or_repo_id), f"{subfolder}/" if subfolder else ""
    ignored = None if subfolder else ["adapter/*"]
    try:
        with bounded():
            file = hf_hub_download(repo, prefix + DESCRIPTION, revision=revision)
            commit = Path(file.removesuffix(prefix + DESCRIPTION)).name
            folder = snapshot_download(repo, revision=commit, allow_patterns=[f"{prefix}*"], ignore_patterns=ignored)
    except Exception as error:
        hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ArtifactError(
            f"'{path_or_repo_id}' is not a local folder; as a repo id: {explain(error, repo)}{hint} "
            f"hftl loads only repositories with {prefix}{DESCRIPTION}. Load others with transformers or timm."
        ) from error
    return Path(folder) / subfolder
