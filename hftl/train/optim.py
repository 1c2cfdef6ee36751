"""AdamW (Loshchilov and Hutter 2019) over backbone and head, and schedules counted in steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hftl.config.schema import Schedule, TrainConfig
from hftl.models.parts import TaskModel


def make_optimizer(model: TaskModel, config: TrainConfig, device: torch.device) -> AdamW:
    """Returns AdamW on the parameters that learn, in up to four groups.

    Backbone (or adapters) at `config.lr`, head at `config.head_lr`; biases and norms without weight decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if model.in_head(name) else "backbone"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    rates = {"head": config.head_lr, "backbone": config.lr}
    settings: list[dict[str, Any]] = [
        {"name": part, "params": params, "lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
        for (part, decays), params in groups.items()
    ]
    return AdamW(settings, fused=device.type in ("cpu", "cuda", "xpu", "mps"))


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Returns the schedule of every group, to be stepped once after every optimizer step.

    The backbone's begins after the share `config.head_first` of the steps; until then only the head learns
    (LP-FT, Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """

    def factor(waits: int) -> Callable[[int], float]:
        rest = total_steps - waits
        warmup = math.ceil(config.warmup_ratio * rest)
        return lambda step: lr_factor(step - waits, config.schedule, rest, warmup) if step >= waits else 0.0

    alone = int((config.head_first or 0.0) * total_steps)
    return LambdaLR(
        optimizer, [factor(alone if group["name"] == "backbone" else 0) for group in optimizer.param_groups]
    )


def lr_factor(step: int, kind: Schedule, total_steps: int, warmup_steps: int) -> float:
    """Returns the share of the peak learning rate used in step `step` (from 0), in [0, 1]."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if kind == "linear":
        return max(1.0 - progress, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
