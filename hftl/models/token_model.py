"""Models that say something of each token: stock classes that tag words and find answers, window by window."""

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


class WindowModel(TextModel):
    """A stock class with outputs for each token. A row is one text in W windows; those it lacks are all padding."""

    pools = False

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` [B, W, T, K] from `input_ids`, `attention_mask` [B, W, T]; 0 where there is no window."""
        return {"logits": through_windows(self.net, inputs)}

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with the auto class of the task."""
        net = self.reopened(place, revision)
        return {"transformers": lambda inputs: through_windows(net, inputs)}


def through_windows(net: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Returns what a stock class computes of each window that holds anything, in its place [B, W, T, K].

    Args:
        net: Takes tokens [N, T]; gives `logits` [N, T, K], or `start_logits` and `end_logits` [N, T].
        inputs: `attention_mask` among them, each [B, W, T].
    """
    there = inputs["attention_mask"].any(-1)
    outputs = net(**{name: values[there] for name, values in inputs.items()})
    logits = outputs.get("logits")
    if logits is None:
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)
    whole = logits.new_zeros((*inputs["attention_mask"].shape, logits.shape[-1]))
    whole[there] = logits
    return whole


def build(run: RunConfig, spec: HeadSpec) -> TextModel:
    """Returns the checkpoint `run.model.name` as the stock class `spec.stock`.

    A checkpoint's way of pooling (`1_Pooling`) says nothing here: each token has features of its own.

    Raises:
        ModelError: The checkpoint cannot be found or has no such class; or a way of pooling is asked for.
    """
    if run.model.pooling in ("cls", "mean"):
        raise ModelError(
            f"model.pooling: '{run.model.pooling}' makes one vector of a text; {spec.model_class} takes one of each "
            "token; say auto."
        )
    return text_model.build(run, spec, WindowModel)


def open_saved(folder: Path, spec: HeadSpec) -> TextModel:
    """Returns the model in a folder written by `TextModel.save`, its head as trained. No code in the folder runs."""
    return text_model.open_saved(folder, spec, WindowModel)
