"""Retrieval: how high what belongs to a query stands among everything, by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

RECALLS = (1, 5, 10)
"""K of recall@K, as is usual for image and text (Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306)."""
_TIE = 1e-12
"""Scores nearer than this are equal: the order in which a product is added up is not a difference."""
_BLOCK = 1024
"""Queries that are compared with all candidates at once."""


def best_ranks(queries: Any, candidates: Any, links: Sequence[tuple[int, int]]) -> Any:
    """Returns the rank [Q] int64 of the best right candidate of each query, from 1.

    Only wrong candidates are counted before it. Those with an equal score are, and so is what is not finite: of ties
    the pessimistic rank, so that a model with one vector (or NaN) for everything does not look perfect.

    Args:
        queries: Embeddings [Q, D].
        candidates: Embeddings [C, D].
        links: (query, candidate) numbers that belong together; every query has one at least.
    """
    queries, candidates = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    linked = np.asarray(links, np.int64).reshape(-1, 2)
    ranks = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ candidates.T
        right = np.zeros(scores.shape, bool)
        inside = linked[(linked[:, 0] >= start) & (linked[:, 0] < start + _BLOCK)]
        right[inside[:, 0] - start, inside[:, 1]] = True
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        ranks[start : start + _BLOCK] = 1 + (~(scores < best - _TIE) & ~right).sum(1)
    return ranks


def recalls(ranks: Any, suffix: str = "") -> dict[str, float]:
    """Returns the share of ranks within each K of `RECALLS`, as `recall_at_K` with a suffix."""
    return {f"recall_at_{k}{suffix}": float((ranks <= k).mean()) for k in RECALLS}


class ImageTextRecall:
    """Recall@K both ways, their mean, and the median ranks, over all images and captions of a split.

    An image counts once, however many rows it has, and is found by a caption where it is the caption's own. Each
    caption counts; an image finds its captions where the best of them is within K (the field's usual counting). Ties:
    `best_ranks`.
    """

    def __init__(self) -> None:
        self.images: dict[int, tuple[int, Any]] = {}
        """Embedding [D] of each image by what it is, with the number of the row that gave it."""
        self.texts: dict[int, tuple[int, Any]] = {}
        """What image the captions of each row belong to, and their embeddings [captions, D]."""

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds `image_embeds` [B, D], and `text_embeds` [B, W, D] of which `texts` [B] count (or [B, D]).

        The first column of `labels` says what each image is.
        """
        images = outputs["image_embeds"].float().cpu().numpy()
        texts = outputs["text_embeds"].float().cpu().numpy()
        texts = texts if texts.ndim == 3 else texts[:, None]
        counts = batch["texts"].tolist() if "texts" in batch else [1] * len(texts)
        rows = batch["index"].tolist() if "index" in batch else range(len(self.texts), len(self.texts) + len(texts))
        for position, (row, image) in enumerate(zip(rows, batch["labels"][:, 0].tolist(), strict=True)):
            self._add_image(image, row, images[position].copy())
            self.texts[row] = image, texts[position, : counts[position]].copy()

    def _add_image(self, image: int, row: int, embedding: Any) -> None:
        if image not in self.images or row < self.images[image][0]:
            self.images[image] = row, embedding

    def merge(self, other: ImageTextRecall) -> None:
        """Adds another process's rows."""
        for image, (row, embedding) in other.images.items():
            self._add_image(image, row, embedding)
        self.texts |= other.texts

    def compute(self) -> dict[str, float]:
        """Returns `recall_at_K_image_to_text`, `recall_at_K_text_to_image`, `mean_recall` and median ranks."""
        names = {image: number for number, (_, image) in enumerate(sorted((r, i) for i, (r, _) in self.images.items()))}
        if not names:
            nothing = np.full(1, np.nan)
            return self._named(nothing, nothing)
        images = np.stack([self.images[image][1] for image in names])
        rows = [self.texts[row] for row in sorted(self.texts)]
        texts = np.concatenate([embeddings for _, embeddings in rows])
        owners = [names[image] for image, embeddings in rows for _ in embeddings]
        to_text = best_ranks(images, texts, [(owner, text) for text, owner in enumerate(owners)])
        to_image = best_ranks(texts, images, list(enumerate(owners)))
        return self._named(to_text, to_image)

    def _named(self, to_text: Any, to_image: Any) -> dict[str, float]:
        found = recalls(to_text, "_image_to_text") | recalls(to_image, "_text_to_image")
        return found | {
            "mean_recall": float(np.mean(list(found.values()))),
            "median_rank_image_to_text": float(np.median(to_text)),
            "median_rank_text_to_image": float(np.median(to_image)),
        }


class TextRecall:
    """Recall@K and mean reciprocal rank of each text's other half among all other halves of a split.

    Equal texts are one, on either side; a text that has several other halves is right with any of them. Ties:
    `best_ranks`.
    """

    def __init__(self) -> None:
        self.sides: tuple[dict[int, Any], dict[int, Any]] = {}, {}
        """Embeddings [D] of first and second texts by what they are."""
        self.links: set[tuple[int, int]] = set()

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds `embedding` and `pair_embedding` [B, D]; `labels` [B, 2] say what both texts are."""
        ids = batch["labels"].T.tolist()
        for side, names, output in zip(self.sides, ids, ("embedding", "pair_embedding"), strict=True):
            for name, embedding in zip(names, outputs[output].float().cpu().numpy(), strict=True):
                side.setdefault(name, embedding.copy())
        self.links |= set(zip(*ids, strict=True))

    def merge(self, other: TextRecall) -> None:
        """Adds another process's rows."""
        for mine, theirs in zip(self.sides, other.sides, strict=True):
            for name, embedding in theirs.items():
                mine.setdefault(name, embedding)
        self.links |= other.links

    def compute(self) -> dict[str, float]:
        """Returns `recall_at_K` and `mrr`."""
        if not self.links:
            nothing = np.full(1, np.nan)
            return {**recalls(nothing), "mrr": float("nan")}
        firsts, seconds = ({name: number for number, name in enumerate(sorted(side))} for side in self.sides)
        queries, candidates = (np.stack([side[name] for name in sorted(side)]) for side in self.sides)
        ranks = best_ranks(queries, candidates, [(firsts[one], seconds[other]) for one, other in self.links])
        return {**recalls(ranks), "mrr": float((1 / ranks).mean())}


class SimilarityCorrelation:
    """Spearman and Pearson correlation of cosines with scores.

    Pairs are put in the order of their values before anything is added up, so a result does not depend on batches.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the cosines of `embedding` with `pair_embedding` [B, D], and `labels` [B]."""
        first, second = outputs["embedding"].double(), outputs["pair_embedding"].double()
        self.rows += zip((first * second).sum(-1).tolist(), batch["labels"].tolist(), strict=True)

    def merge(self, other: SimilarityCorrelation) -> None:
        """Adds another process's rows."""
        self.rows += other.rows

    def compute(self) -> dict[str, float]:
        """Returns `spearman` and `pearson`; NaN where cosines or scores do not vary, or are not finite."""
        from scipy.stats import pearsonr, spearmanr

        cosines, scores = np.array(sorted(self.rows)).reshape(-1, 2).T
        varied = len(cosines) > 1 and np.isfinite(cosines).all() and np.ptp(cosines) > 0 and np.ptp(scores) > 0
        if not varied:
            return {"spearman": float("nan"), "pearson": float("nan")}
        found: dict[str, Any] = {"spearman": spearmanr(cosines, scores), "pearson": pearsonr(cosines, scores)}
        return {name: float(value.statistic) for name, value in found.items()}
