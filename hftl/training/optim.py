"""AdamW (Loshchilov and Hutter 2019) with parameter groups for backbone and head, and learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from hftl.config.schema import SchedulerType, TrainConfig
from hftl.models.task_model import TaskModel


def make_optimizer(model: TaskModel, config: TrainConfig, device: torch.device) -> AdamW:
    """Returns AdamW for the trainable parameters, in up to four parameter groups.

    Backbone and adapters have learning rate `config.lr`, the head `config.head_lr`; biases and norms have no weight
    decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if model.in_head(name) else "backbone"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    rates = {"head": config.head_lr, "backbone": config.lr}
    settings: list[dict[str, Any]] = [
        {
            "name": part,
            "params": params,
            "lr": rates[part],
            "peak_lr": rates[part],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, decays), params in groups.items()
    ]
    return AdamW(settings, fused=device.type in ("cpu", "cuda", "xpu", "mps"))


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total_steps: int) -> dict[str, float]:
    """Sets the learning rate of every parameter group for `step` (from 0) and returns them by `head` and `backbone`.

    Learning rates are a pure function of the step, so checkpoints do not store them. The schedule of the backbone
    starts after the fraction `config.freeze_backbone_ratio` of the steps (LP-FT, Kumar et al. 2022,
    https://arxiv.org/abs/2202.10054).
    """
    frozen_steps = int((config.freeze_backbone_ratio or 0.0) * total_steps)
    rates = {}
    for group in optimizer.param_groups:
        start = frozen_steps if group["name"] == "backbone" else 0
        scheduled = total_steps - start
        warmup = math.ceil(config.warmup_ratio * scheduled)
        factor = lr_factor(step - start, config.lr_scheduler_type, scheduled, warmup) if step >= start else 0.0
        group["lr"] = rates[group["name"]] = group["peak_lr"] * factor
    return rates


def lr_factor(step: int, kind: SchedulerType, total_steps: int, warmup_steps: int) -> float:
    """Returns the learning rate of `step` (from 0) as a fraction of the peak, in [0, 1]."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if kind == "linear":
        return max(1.0 - progress, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
