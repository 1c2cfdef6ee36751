"""Where a saved model lies: a run folder, the model folder in it, or a repository on the hub."""

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
"""The configuration of the run, beside the weights."""


def artifact_folder(path: str | Path) -> Path:
    """Returns the folder that holds the model itself: `path`, or `path/model`.

    Raises:
        ArtifactError: Neither is one that hftl saved.
    """
    folder = Path(path)
    folder = folder / "model" if (folder / "model" / DESCRIPTION).is_file() else folder
    if not (folder / DESCRIPTION).is_file():
        raise ArtifactError(
            f"'{path}' is neither a run folder nor a model folder of hftl: no {DESCRIPTION} there or in model/."
        )
    return folder


def trained_data(folder: Path) -> DataConfig:
    """Returns the data section of the run that made the model in `folder`."""
    return load_saved_config(folder / CONFIG).data if (folder / CONFIG).is_file() else DataConfig()


def rows_left_out(folder: Path) -> dict[str, dict[int, Any]]:
    """Returns the rows that the run of the model in `folder` left out, by split and number; none away from its run."""
    return read_quarantine(folder.parent) if (folder.parent / "config.yaml").is_file() else {}


def find(place: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """Returns the folder of a saved model, downloaded first where `place` is a hub id.

    Raises:
        ArtifactError: There is no such folder or repository, or hftl did not make it.
    """
    is_path = str(place).startswith((".", "/", "~")) or str(place).count("/") > 1
    if is_path or Path(place).exists():
        return Path(place).expanduser() / subfolder
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, inside = str(place), f"{subfolder}/" if subfolder else ""
    everything_else = None if subfolder else ["adapter/*"]
    try:
        with bounded():
            file = hf_hub_download(repo, inside + DESCRIPTION, revision=revision)
            commit = Path(file.removesuffix(inside + DESCRIPTION)).name
            folder = snapshot_download(
                repo, revision=commit, allow_patterns=[f"{inside}*"], ignore_patterns=everything_else
            )
    except Exception as error:
        path = Path(place)
        guess = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ArtifactError(
            f"'{place}' is not a folder here, and as a hub id: {explain(error, repo)}{guess} "
            f"Models that hftl pushed have {inside}{DESCRIPTION}; open others with transformers or timm."
        ) from error
    return Path(folder) / subfolder
