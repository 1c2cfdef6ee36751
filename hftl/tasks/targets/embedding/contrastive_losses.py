"""Contrastive losses with in-batch negatives from all processes.

The loss of a row depends on the embeddings of other rows. In training they are gathered with gradients: each process
sums the gradients of all processes for its embeddings, so N processes have the gradient of one with the whole batch.
In evaluation nothing is gathered. Batches are the same for any number of processes, and so are their losses.

A batch is a micro-batch on all processes: gradient accumulation makes steps larger, but adds no negatives.

Rows with weight 0 (padding rows) are not negatives. Neither are pairs that share an image or a text with a row, whose
paired item may be correct for the row as well.

Shapes: B pairs of this process, N pairs of all processes, D embedding size.
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
        first: Unit-length embeddings of the first items, such as images [B, D].
        second: Unit-length embeddings of the paired items [B, D].
        first_ids: Content ids of the first items [B] int64, equal for equal images or texts (`content_id`).
        second_ids: Content ids of the paired items [B] int64.
        weight: Row weights [B]; 0 for padding rows. None weights all rows equally.
    """

    first: Tensor
    second: Tensor
    first_ids: Tensor
    second_ids: Tensor
    weight: Tensor | None = None


def info_nce(pairs: Pairs, scale: Tensor | float) -> Tensor:
    """Returns the symmetric cross entropy of each pair [B], over all second items and over all first items.

    Source: CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3) and InfoNCE (van den Oord et al.
    2018, https://arxiv.org/abs/1807.03748).

    Args:
        pairs: Pairs of this process.
        scale: Inverse temperature, the factor of cosines.
    """
    forward, backward, masked, positives = _pair_logits(pairs, scale)
    positive_logits = forward.gather(1, positives[:, None])[:, 0]
    normalizers = [logits.masked_fill(masked, -torch.inf).logsumexp(1) for logits in (forward, backward)]
    return (normalizers[0] + normalizers[1]) / 2 - positive_logits


def sigmoid_loss(pairs: Pairs, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Returns the summed binary cross entropy of each first item with all second items [B].

    Source: SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1). Without a softmax, the terms of
    the combinations are independent.

    Args:
        pairs: Pairs of this process.
        scale: Inverse temperature, the factor of cosines.
        bias: Summand of scaled cosines; negative, since most combinations are negatives.
    """
    forward, _, masked, positives = _pair_logits(pairs, scale)
    logits = forward + bias
    signs = torch.full_like(logits, -1.0).scatter(1, positives[:, None], 1.0)
    return -functional.logsigmoid(signs * logits).masked_fill(masked, 0.0).sum(1)


def cosent(cosines: Tensor, scores: Tensor, scale: float = 20.0, weight: Tensor | None = None) -> Tensor:
    """Returns the CoSENT loss of each row [B] in nats.

    The loss is log(1 + sum over j with score_j < score_i of exp(scale (cosine_j - cosine_i))), which depends on scores
    only through their order.

    Source: CoSENT (Su 2022, https://kexue.fm/archives/8847), here with one logarithm per row instead of one per batch,
    so every row has a loss.

    Args:
        cosines: Cosine of each pair [B].
        scores: Similarity score of each pair [B].
        scale: Inverse temperature, the factor of cosines.
        weight: Row weights [B]; 0 for padding rows.
    """
    valid = torch.ones_like(scores) if weight is None else (weight > 0).to(scores.dtype)
    (all_cosines,), (all_scores,), _ = _all_rows([cosines.float()[:, None]], [torch.stack([scores, valid], 1)])
    lower = (all_scores[None, :, 0] < scores[:, None]) & (all_scores[None, :, 1] > 0)
    gaps = (scale * (all_cosines[None, :, 0] - cosines.float()[:, None])).masked_fill(~lower, -torch.inf)
    return functional.pad(gaps, (1, 0)).logsumexp(1)


def content_id(content: str | bytes) -> int:
    """Returns a 64-bit hash of a text or of image bytes, within int64."""
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _pair_logits(pairs: Pairs, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the logits of all pair combinations.

    Returns:
        Logits of first items with all second items [B, N], logits of second items with all first items [B, N], mask of
        combinations to ignore [B, N], column of the positive pair of each row [B].
    """
    first, second = pairs.first.float(), pairs.second.float()
    valid = torch.ones_like(pairs.first_ids) if pairs.weight is None else (pairs.weight > 0).to(torch.int64)
    ids = torch.stack([pairs.first_ids, pairs.second_ids, valid], 1)
    (all_first, all_second), (all_ids,), start = _all_rows([first, second], [ids])
    positives = torch.arange(start, start + len(first), device=first.device)
    masked = (ids[:, None, :2] == all_ids[None, :, :2]).any(-1) | (all_ids[None, :, 2] == 0)
    masked = masked.scatter(1, positives[:, None], False)
    return scale * first @ all_second.T, scale * second @ all_first.T, masked, positives


def _all_rows(embeddings: list[Tensor], constants: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Returns the rows of all processes in rank order, and the index of the first row of this process.

    Args:
        embeddings: Tensors [B, D], gathered with gradients.
        constants: Tensors [B, M] of equal type, gathered without gradients.
    """
    if not (_num_processes() > 1 and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in embeddings)):
        return embeddings, constants, 0
    rank, size = torch.distributed.get_rank(), torch.tensor([len(embeddings[0])], device=embeddings[0].device)
    sizes = [torch.empty_like(size) for _ in range(_num_processes())]
    torch.distributed.all_gather(sizes, size)
    counts = [int(number) for number in sizes]
    widths = [tensor.shape[1] for tensor in embeddings]
    gathered = cast(Tensor, _Gather.apply(torch.cat(embeddings, 1), counts, rank))
    rows = [_gather(tensor, counts) for tensor in constants]
    return list(gathered.split(widths, 1)), rows, sum(counts[:rank])


def _num_processes() -> int:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    """Returns the rows [counts[process], …] of all processes; pads them, since collectives need equal shapes."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(received, padded)
    return torch.cat([block[:count] for block, count in zip(received, counts, strict=True)])


class _Gather(torch.autograd.Function):
    """All-gather of rows; the backward pass sums the gradients of all processes for the rows of this process."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.local = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _gather(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.local], None, None
