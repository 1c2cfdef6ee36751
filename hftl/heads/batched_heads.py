"""Linear heads trained in parallel on the same features as one batched tensor, independently of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # defaults of torch.optim.AdamW


@dataclass(frozen=True)
class HeadSetting:
    """Hyperparameters of one head."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    seed: int
    """Seed of its initialization and of the order of its rows."""


class BatchedHeads:
    """H linear heads [D -> K], each trained on rows in the order of its seed.

    A step is AdamW (Loshchilov and Hutter 2019) on the mean loss of each head, with gradients clipped per head. It
    matches `torch.optim.AdamW` with `clip_grad_norm_` on each head, in a few batched tensor operations.

    Args:
        head: Initial weights of all heads with the first seed; heads with other seeds draw weights of equal standard
            deviation.
        settings: One per head, grouped by seed.
        max_norm: Maximum gradient norm per head; 0: no clipping.
        device: Device of weights and optimizer state.
    """

    def __init__(self, head: nn.Linear, settings: Sequence[HeadSetting], max_norm: float, device: torch.device) -> None:
        self.settings = list(settings)
        self.seeds = list(dict.fromkeys(setting.seed for setting in settings))
        self.max_norm = max_norm
        self.steps = 0
        initial = [_initial_weights(head, seed if seed != self.seeds[0] else None) for seed in self.seeds]
        per_seed = len(settings) // len(self.seeds)
        self.weight = torch.stack([w for w, _ in initial]).repeat_interleave(per_seed, 0).to(device).requires_grad_()
        self.bias = torch.stack([b for _, b in initial]).repeat_interleave(per_seed, 0).to(device).requires_grad_()
        self._parameters: tuple[Tensor, ...] = (self.weight,) if head.bias is None else (self.weight, self.bias)
        self._moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in self._parameters]
        self._lr = torch.tensor([setting.lr for setting in settings], device=device)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self.alive = torch.ones(len(settings), dtype=torch.bool, device=device)
        """Whether all losses and gradients of a head were finite so far, [H]; other heads are no longer updated."""

    def logits(self, features: Tensor) -> Tensor:
        """Returns logits [H, B, K] for features [S, B, D], one batch of rows per seed."""
        grouped = self.weight.unflatten(0, (len(self.seeds), -1))
        return torch.einsum("sbd,shkd->shbk", features, grouped).flatten(0, 1) + self.bias[:, None]

    def step(self, features: Tensor, weights: Tensor, losses: Callable[[Tensor], Tensor], factor: float) -> Tensor:
        """Runs one optimizer step for all heads, and returns the mean loss of each head [H].

        Args:
            features: Rows of this step, [S, B, D].
            weights: Weight of each row in the mean loss of the step, [S, B]; 0 for padding rows.
            losses: Maps logits [H, B, K] to the loss of each row for each head [H, B].
            factor: Factor of the peak learning rates.
        """
        head_weights = weights.repeat_interleave(len(self.settings) // len(self.seeds), 0)
        means = (losses(self.logits(features)) * head_weights).sum(1)
        gradients = torch.autograd.grad(means.sum(), self._parameters)
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        self.alive &= means.isfinite() & norms.isfinite()
        if self.max_norm:
            scale = (self.max_norm / (norms + 1e-6)).clamp(max=1.0)
            gradients = [gradient * _expand(scale, gradient) for gradient in gradients]
        self.steps += 1
        with torch.no_grad():
            for param, gradient, moments in zip(self._parameters, gradients, self._moments, strict=True):
                self._adamw(param, gradient, moments, factor)
        return means.detach()

    def _adamw(self, param: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], factor: float) -> None:
        first, second = moments
        lr = self._lr * factor
        # biases have no weight decay
        new = param * (1 - _expand(lr * self._decay, param)) if param.ndim > 2 else param.clone()
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrected = (second.sqrt() / (1 - BETAS[1] ** self.steps) ** 0.5).add_(EPS)
        new -= _expand(lr / (1 - BETAS[0] ** self.steps), param) * first / corrected
        param.copy_(torch.where(_expand(self.alive, param), new, param))

    def copy_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns copies of the current weight [K, D] and bias [K] of one head."""
        return self.weight[number].detach().clone(), self.bias[number].detach().clone()


def _expand(values: Tensor, tensor: Tensor) -> Tensor:
    """Reshapes values [H] for broadcasting over a tensor [H, …]."""
    return values.reshape(-1, *[1] * (tensor.ndim - 1))


def _initial_weights(head: nn.Linear, seed: int | None) -> tuple[Tensor, Tensor]:
    weight = head.weight.detach().float().cpu().clone()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu().clone()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(weight.shape, generator=generator) * weight.std()
    return weight, bias
