"""The default that needs no network: a small model trained by this project on letters, shown on handwritten digits."""

from __future__ import annotations

from pathlib import Path

from hftl.errors import ModelError, nearest

MODELS = ("letters",)


def model_folder(name: str) -> Path:
    """Returns the folder of an embedded model, in timm's `local-dir:` layout.

    Raises:
        ModelError: There is no such model.
    """
    if name not in MODELS:
        raise ModelError(f"model.name: embedded models are {', '.join(MODELS)}, not '{name}'.{nearest(name, MODELS)}")
    return Path(__file__).parent / name
