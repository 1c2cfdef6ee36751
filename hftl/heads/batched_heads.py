"""Many linear heads over the same features, trained side by side as one tensor; each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # as torch.optim.AdamW has them


@dataclass(frozen=True)
class HeadSetting:
    """What one head is trained with."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    seed: int
    """Of its initialisation and of the order of its rows."""


class BatchedHeads:
    """H linear heads [D -> K] that learn from rows of their own seed's order.

    A step is AdamW (Loshchilov and Hutter 2019) on the mean loss of each head, its gradient cut to a norm of its own:
    what `torch.optim.AdamW` and `clip_grad_norm_` do to one head, done to all in a few tensor operations.

    Args:
        head: Where all begin that have the first seed; others draw weights of the same spread.
        settings: One for each head; those of a seed stand together.
        max_norm: Largest gradient norm, 0 for any.
        device: Where they train.
    """

    def __init__(self, head: nn.Linear, settings: Sequence[HeadSetting], max_norm: float, device: torch.device) -> None:
        self.settings = list(settings)
        self.seeds = list(dict.fromkeys(setting.seed for setting in settings))
        self.max_norm = max_norm
        self.steps = 0
        starts = [_start(head, seed if seed != self.seeds[0] else None) for seed in self.seeds]
        each = len(settings) // len(self.seeds)
        self.weight = torch.stack([w for w, _ in starts]).repeat_interleave(each, 0).to(device).requires_grad_()
        self.bias = torch.stack([b for _, b in starts]).repeat_interleave(each, 0).to(device).requires_grad_()
        self._parts: tuple[Tensor, ...] = (self.weight,) if head.bias is None else (self.weight, self.bias)
        self._moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in self._parts]
        self._lr = torch.tensor([setting.lr for setting in settings], device=device)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self.alive = torch.ones(len(settings), dtype=torch.bool, device=device)
        """Which heads have only met finite losses and gradients, [H]; the others no longer move."""

    def logits(self, features: Tensor) -> Tensor:
        """Returns [H, B, K] from features [S, B, D], one set of rows for each seed."""
        grouped = self.weight.unflatten(0, (len(self.seeds), -1))
        return torch.einsum("sbd,shkd->shbk", features, grouped).flatten(0, 1) + self.bias[:, None]

    def step(self, features: Tensor, weights: Tensor, losses: Callable[[Tensor], Tensor], factor: float) -> Tensor:
        """Moves every head by one optimizer step; returns the mean loss of each, [H].

        Args:
            features: Rows of this step, [S, B, D].
            weights: Share of each row in its step's loss, [S, B]; 0 for rows that only fill up.
            losses: Logits [H, B, K] -> the loss of each row for each head, [H, B].
            factor: Share of the peak learning rates.
        """
        of_each = weights.repeat_interleave(len(self.settings) // len(self.seeds), 0)
        means = (losses(self.logits(features)) * of_each).sum(1)
        gradients = torch.autograd.grad(means.sum(), self._parts)
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in gradients]).norm(dim=0)
        self.alive &= means.isfinite() & norms.isfinite()
        if self.max_norm:
            scale = (self.max_norm / (norms + 1e-6)).clamp(max=1.0)
            gradients = [part * _like(scale, part) for part in gradients]
        self.steps += 1
        with torch.no_grad():
            for part, gradient, moments in zip(self._parts, gradients, self._moments, strict=True):
                self._adamw(part, gradient, moments, factor)
        return means.detach()

    def _adamw(self, part: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], factor: float) -> None:
        first, second = moments
        rates = self._lr * factor
        new = part * (1 - _like(rates * self._decay, part)) if part.ndim > 2 else part.clone()  # biases do not decay
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrected = (second.sqrt() / (1 - BETAS[1] ** self.steps) ** 0.5).add_(EPS)
        new -= _like(rates / (1 - BETAS[0] ** self.steps), part) * first / corrected
        part.copy_(torch.where(_like(self.alive, part), new, part))

    def copy_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns weight [K, D] and bias [K] of one head, as they are now."""
        return self.weight[number].detach().clone(), self.bias[number].detach().clone()


def _like(values: Tensor, part: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (part.ndim - 1))


def _start(head: nn.Linear, seed: int | None) -> tuple[Tensor, Tensor]:
    weight = head.weight.detach().float().cpu().clone()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu().clone()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(weight.shape, generator=generator) * weight.std()
    return weight, bias
