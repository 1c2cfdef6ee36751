"""Exhaustive span search of extractive question answering over sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_SCORE = -1e9
"""Score of an empty context."""


@dataclass(frozen=True)
class SpanCandidate:
    """Span of a context.

    Attributes:
        start: Index of the first character.
        end: Index after the last character.
        score: Sum of the start logit and the end logit.
        probability: Softmax over all spans of the context.
    """

    start: int
    end: int
    score: float
    probability: float


@dataclass(frozen=True)
class ContextSpans:
    """Best spans of one context.

    Attributes:
        candidates: Distinct spans, highest score first; [] if the context is empty.
        null_score: Score of "no answer": the minimum over windows, since one window with an answer suffices.
        null_probability: Softmax of "no answer" over all spans and itself; 0 if "no answer" is not allowed.
    """

    candidates: list[SpanCandidate]
    null_score: float
    null_probability: float


def allowed_tokens(offsets: Tensor) -> Tensor:
    """Returns whether a token may start or end an answer [B, W, T]: context tokens and the first token of each window.

    Args:
        offsets: Start and end character of each token in the context [B, W, T, 2]; -1 for tokens outside the context.
    """
    allowed = offsets[..., 0] >= 0
    allowed[..., 0] = True
    return allowed


def find_spans(
    logits: Tensor, offsets: Tensor, windows: Tensor, max_tokens: int, num_candidates: int, null: bool
) -> list[ContextSpans]:
    """Returns the best spans of each row over all of its windows.

    The score of a span is the sum of the logits of its first and of its last token (Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805). "No answer" is the span of the first token of a window.

    Args:
        logits: Start and end logits [B, W, T, 2].
        offsets: Start and end character of each token in the context [B, W, T, 2]; -1 for tokens outside the context.
        windows: Whether a row has a window [B, W] bool.
        max_tokens: Largest number of tokens of a span.
        num_candidates: Number of candidates per row.
        null: Whether "no answer" is allowed.
    """
    logits = logits.float()
    in_context = offsets[..., 0] >= 0
    start_logits, end_logits = (logits[..., i].masked_fill(~in_context, -torch.inf) for i in (0, 1))
    max_tokens = min(max_tokens, logits.shape[2])
    span_ends = torch.nn.functional.pad(end_logits, (0, max_tokens - 1), value=-torch.inf).unfold(-1, max_tokens, 1)
    scores = (start_logits[..., None] + span_ends).flatten(1)  # [B, W x T x max_tokens]
    null_scores = logits[:, :, 0].sum(-1).masked_fill(~windows, torch.inf).amin(1)
    normalizer = scores.logsumexp(1)
    normalizer = torch.logaddexp(normalizer, null_scores) if null else normalizer
    count = min(num_candidates * logits.shape[1], scores.shape[1])  # windows overlap, so spans may repeat
    best, indices = scores.topk(count, dim=1)
    first = torch.div(indices, max_tokens, rounding_mode="floor")
    last = (first + indices % max_tokens).clamp(max=in_context[0].numel() - 1)
    starts = offsets[..., 0].flatten(1).gather(1, first)
    ends = offsets[..., 1].flatten(1).gather(1, last)
    probabilities = (best - normalizer[:, None]).exp()
    columns = (starts.tolist(), ends.tolist(), best.tolist(), probabilities.tolist())
    null_probabilities = (null_scores - normalizer).exp().tolist() if null else [0.0] * len(scores)
    return [
        ContextSpans(_distinct(list(zip(*row, strict=True)), num_candidates), score, probability)
        for row, score, probability in zip(
            zip(*columns, strict=True), null_scores.tolist(), null_probabilities, strict=True
        )
    ]


def _distinct(spans: Sequence[tuple[int, int, float, float]], num_candidates: int) -> list[SpanCandidate]:
    """Returns the first occurrence of each span, in order."""
    distinct: dict[tuple[int, int], SpanCandidate] = {}
    for start, end, score, probability in spans:
        if score > NO_SCORE and (start, end) not in distinct:
            distinct[start, end] = SpanCandidate(start, end, score, probability)
    return list(distinct.values())[:num_candidates]
