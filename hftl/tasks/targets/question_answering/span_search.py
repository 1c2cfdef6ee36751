"""Which part of a context is the answer: every span of every window is scored, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_SCORE = -1e9
"""Score where there is no span at all."""


@dataclass(frozen=True)
class SpanCandidate:
    """A part of a context: its first character, the one after its last, its score, and its share of all spans'."""

    start: int
    end: int
    score: float
    share: float


@dataclass(frozen=True)
class Found:
    """What was found in one context."""

    candidates: list[SpanCandidate]
    """Different spans, best first; none where the context is empty."""
    null_score: float
    """Score of "no answer": the least of the windows, since an answer in one of them is enough."""
    null_share: float
    """Share of "no answer" among all spans and it; 0 where it is not allowed."""


def allowed_tokens(offsets: Tensor) -> Tensor:
    """Returns which tokens may begin or end what is said [B, W, T]: those of the context, and the first of each window.

    Args:
        offsets: First character and end of each token in the context [B, W, T, 2], -1 where it is not of it.
    """
    allowed = offsets[..., 0] >= 0
    allowed[..., 0] = True
    return allowed


def find_spans(logits: Tensor, offsets: Tensor, windows: Tensor, longest: int, most: int, null: bool) -> list[Found]:
    """Returns the best spans of each row over all of its windows.

    A span's score is the sum of the logits of its first and of its last token (Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805); "no answer" is the span of each window's first token.

    Args:
        logits: Of being first and last [B, W, T, 2].
        offsets: First character and end of each token in the context [B, W, T, 2], -1 where it is not of it.
        windows: Which windows a row has [B, W] bool.
        longest: Most tokens of a span.
        most: Candidates to return.
        null: Whether "no answer" takes a share.
    """
    logits = logits.float()
    inside = offsets[..., 0] >= 0
    first, last = (logits[..., i].masked_fill(~inside, -torch.inf) for i in (0, 1))
    longest = min(longest, logits.shape[2])
    ends = torch.nn.functional.pad(last, (0, longest - 1), value=-torch.inf).unfold(-1, longest, 1)
    scores = (first[..., None] + ends).flatten(1)  # [B, W x T x longest]
    nulls = logits[:, :, 0].sum(-1).masked_fill(~windows, torch.inf).amin(1)
    whole = scores.logsumexp(1)
    whole = torch.logaddexp(whole, nulls) if null else whole
    count = min(most * logits.shape[1], scores.shape[1])  # a span stands in several windows perhaps
    best, places = scores.topk(count, dim=1)
    tokens = torch.div(places, longest, rounding_mode="floor")
    starts = offsets[..., 0].flatten(1).gather(1, tokens)
    ends_at = offsets[..., 1].flatten(1).gather(1, (tokens + places % longest).clamp(max=inside[0].numel() - 1))
    shares = (best - whole[:, None]).exp()
    columns = (starts.tolist(), ends_at.tolist(), best.tolist(), shares.tolist())
    null_shares = (nulls - whole).exp().tolist() if null else [0.0] * len(scores)
    return [
        Found(_different(list(zip(*row, strict=True)), most), score, share)
        for row, score, share in zip(zip(*columns, strict=True), nulls.tolist(), null_shares, strict=True)
    ]


def _different(spans: Sequence[tuple[int, int, float, float]], most: int) -> list[SpanCandidate]:
    """Returns the first of each span, in order."""
    kept: dict[tuple[int, int], SpanCandidate] = {}
    for start, end, score, share in spans:
        if score > NO_SCORE and (start, end) not in kept:
            kept[start, end] = SpanCandidate(start, end, score, share)
    return list(kept.values())[:most]
