"""Embedded models that need no network access: a small network pretrained by this project on images of letters."""

from __future__ import annotations

from pathlib import Path

from hftl.errors import ModelError, nearest

MODELS = ("letters",)


def model_folder(name: str) -> Path:
    """Returns the folder of an embedded model, in the format of timm's `local-dir:`.

    Raises:
        ModelError: The model does not exist.
    """
    if name not in MODELS:
        allowed = ", ".join(MODELS)
        raise ModelError(
            f"model.name: embedded model '{name}' does not exist; allowed: {allowed}.{nearest(name, MODELS)}"
        )
    return Path(__file__).parent / name
