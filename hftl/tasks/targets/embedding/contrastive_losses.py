"""Losses that compare each pair of a batch with all others, over all processes.

A row's loss needs the embeddings of rows elsewhere. In training these are gathered with their gradients: the gradient
that a process's loss sends to another one's embeddings is added up there, so that N processes have the gradient of one
with the whole batch. Where nothing is learnt (evaluation) nothing is gathered: each batch stands for itself, and since
batches are the same on any number of processes, so are their losses.

"A batch" is a micro-batch on all processes: accumulating gradients gives larger steps, not more negatives.

Rows of weight 0 (which fill up a batch) are no negatives, nor are pairs that share an image or a text with a row: their
other half may be right for it too.

Shapes: B pairs of this process, N of all processes, D embedding size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class Pairs:
    """One batch of pairs.

    Attributes:
        first: Embeddings of length 1 [B, D], of images for instance.
        second: Those of their other halves [B, D].
        first_ids: What each first half is [B] int64: equal numbers for equal images or texts (`content_id`).
        second_ids: The same of second halves.
        weight: Of each row [B]; 0 marks one that counts nothing. None: all count.
    """

    first: Tensor
    second: Tensor
    first_ids: Tensor
    second_ids: Tensor
    weight: Tensor | None = None


def info_nce(pairs: Pairs, scale: Tensor | float) -> Tensor:
    """Returns the symmetric cross entropy of each pair [B]: its second half among all second halves, and vice versa.

    As CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3) and InfoNCE (van den Oord et al. 2018,
    https://arxiv.org/abs/1807.03748).

    Args:
        pairs: Of this process.
        scale: What cosines are multiplied by, the inverse temperature.
    """
    forward, backward, masked, own = _compared(pairs, scale)
    right = forward.gather(1, own[:, None])[:, 0]
    sums = [logits.masked_fill(masked, -torch.inf).logsumexp(1) for logits in (forward, backward)]
    return (sums[0] + sums[1]) / 2 - right


def sigmoid_loss(pairs: Pairs, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Returns for each pair [B] the binary cross entropies of its first half with all second halves, added up.

    As SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1): no softmax, so each combination is
    judged by itself.

    Args:
        pairs: Of this process.
        scale: What cosines are multiplied by.
        bias: What is added then; a negative one, since most combinations are wrong.
    """
    forward, _, masked, own = _compared(pairs, scale)
    logits = forward + bias
    signs = torch.full_like(logits, -1.0).scatter(1, own[:, None], 1.0)
    return -functional.logsigmoid(signs * logits).masked_fill(masked, 0.0).sum(1)


def cosent(cosines: Tensor, scores: Tensor, scale: float = 20.0, weight: Tensor | None = None) -> Tensor:
    """Returns for each row [B] how far cosines of rows with lower scores come up to its own, in nats.

    log(1 + sum over j with score_j < score_i of exp(scale (cosine_j - cosine_i))): CoSENT (Su 2022,
    https://kexue.fm/archives/8847) with one logarithm for each row rather than one for the batch, so that every row
    has a loss of its own. Only the order of scores matters.

    Args:
        cosines: Of each pair [B].
        scores: How alike the pair is [B].
        scale: The inverse temperature.
        weight: As `Pairs.weight`.
    """
    real = torch.ones_like(scores) if weight is None else (weight > 0).to(scores.dtype)
    (others,), (known,), _ = _everywhere([cosines.float()[:, None]], [torch.stack([scores, real], 1)])
    lower = (known[None, :, 0] < scores[:, None]) & (known[None, :, 1] > 0)
    gaps = (scale * (others[None, :, 0] - cosines.float()[:, None])).masked_fill(~lower, -torch.inf)
    return functional.pad(gaps, (1, 0)).logsumexp(1)


def content_id(content: str | bytes) -> int:
    """Returns a number that equal contents share, within int64, and others practically never do."""
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _compared(pairs: Pairs, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logits of both directions, what is not to be compared, and where each row's own pair is.

    Logits [B, N] of first with all second halves, and of second with all first ones; mask [B, N] of both; columns [B].
    """
    first, second = pairs.first.float(), pairs.second.float()
    real = torch.ones_like(pairs.first_ids) if pairs.weight is None else (pairs.weight > 0).to(torch.int64)
    about = torch.stack([pairs.first_ids, pairs.second_ids, real], 1)
    (all_first, all_second), (known,), start = _everywhere([first, second], [about])
    own = torch.arange(start, start + len(first), device=first.device)
    masked = (about[:, None, :2] == known[None, :, :2]).any(-1) | (known[None, :, 2] == 0)
    masked = masked.scatter(1, own[:, None], False)
    return scale * first @ all_second.T, scale * second @ all_first.T, masked, own


def _everywhere(learnt: list[Tensor], known: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Returns the rows of all processes, in their order, and where this one's begin.

    Args:
        learnt: Tensors [B, D] through which gradients pass.
        known: Tensors [B, M] of equal type, without gradient.
    """
    if not (_processes() > 1 and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learnt)):
        return learnt, known, 0
    rank, size = torch.distributed.get_rank(), torch.tensor([len(learnt[0])], device=learnt[0].device)
    sizes = [torch.empty_like(size) for _ in range(_processes())]
    torch.distributed.all_gather(sizes, size)
    counts = [int(number) for number in sizes]
    widths = [tensor.shape[1] for tensor in learnt]
    joined = cast(Tensor, _Gather.apply(torch.cat(learnt, 1), counts, rank))
    rows = [_gathered(tensor, counts) for tensor in known]
    return list(joined.split(widths, 1)), rows, sum(counts[:rank])


def _processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _gathered(rows: Tensor, counts: list[int]) -> Tensor:
    """Returns the rows [counts[process], …] of all processes; collectives want equal shapes, so these are filled up."""
    filled = rows.new_zeros(max(counts), *rows.shape[1:])
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in counts]
    torch.distributed.all_gather(parts, filled)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    """Rows of all processes; backwards, the gradients that all processes have for this one's rows are added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _gathered(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.own], None, None
