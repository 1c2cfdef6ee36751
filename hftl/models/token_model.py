"""Token-level models: transformers classes for token classification and question answering on sliding windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hftl.config.schema import RunConfig
from hftl.errors import ModelError
from hftl.models import text_model
from hftl.models.checkpoint_metadata import name_problem
from hftl.models.task_model import HeadSpec, ReloadedModel
from hftl.models.text_model import TextModel

__all__ = ["build", "name_problem", "open_saved"]


class TokenModel(TextModel):
    """transformers class with outputs per token. A row is one text in up to W windows; missing windows are padding."""

    pools = False

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, W, T, K] for `input_ids`, `attention_mask` [B, W, T]; 0 for padding windows."""
        return {"logits": forward_windows(self.net, inputs)}

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with the auto class of the task."""
        net = self.reload(path_or_repo_id, revision)
        return {"transformers": lambda inputs: forward_windows(net, inputs)}


def forward_windows(net: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Runs a network on all non-padding windows, and returns logits [B, W, T, K], 0 for padding windows.

    Args:
        net: Takes tokens [N, T]; returns `logits` [N, T, K], or `start_logits` and `end_logits` [N, T].
        inputs: Tensors [B, W, T], including `attention_mask`.
    """
    is_window = inputs["attention_mask"].any(-1)
    outputs = net(**{name: values[is_window] for name, values in inputs.items()})
    logits = outputs.get("logits")
    if logits is None:
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)
    padded = logits.new_zeros((*inputs["attention_mask"].shape, logits.shape[-1]))
    padded[is_window] = logits
    return padded


def build(run: RunConfig, spec: HeadSpec) -> TextModel:
    """Builds the checkpoint `run.model.name` as the transformers class `spec.model_class`.

    The pooling of the checkpoint (`1_Pooling`) is ignored, because the head uses token features.

    Raises:
        ModelError: The checkpoint is missing or has no such class, or `model.pooling` is set to `cls` or `mean`.
    """
    if run.model.pooling in ("cls", "mean"):
        raise ModelError(
            f"model.pooling: '{run.model.pooling}' is invalid for {spec.model_class}, which uses token features. Set "
            "auto."
        )
    return text_model.build(run, spec, TokenModel)


def open_saved(folder: Path, spec: HeadSpec) -> TextModel:
    """Loads a model saved by `TextModel.save`, with its trained head. Runs no code from the folder."""
    return text_model.open_saved(folder, spec, TokenModel)
