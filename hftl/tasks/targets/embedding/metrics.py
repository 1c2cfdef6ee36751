"""Retrieval metrics by cosine, and correlation of cosines with similarity scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

RECALLS = (1, 5, 10)
"""K of recall@K, as usual for images and captions (Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306)."""
_TOLERANCE = 1e-12
"""Largest difference of scores that counts as a tie: the order of summation changes the last bits."""
_CHUNK_QUERIES = 1024


def best_ranks(queries: Any, candidates: Any, links: Sequence[tuple[int, int]]) -> Any:
    """Returns the rank of the best positive candidate of each query [Q] int64, starting at 1.

    The rank counts negatives with a higher, equal or non-finite score. Ranks of ties are pessimistic, so a model with
    one vector (or NaN) for all inputs has no perfect recall.

    Args:
        queries: Embeddings [Q, D].
        candidates: Embeddings [C, D].
        links: (query, candidate) indices of positive pairs; every query has at least one.
    """
    queries, candidates = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    pairs = np.asarray(links, np.int64).reshape(-1, 2)
    ranks = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), _CHUNK_QUERIES):
        scores = queries[start : start + _CHUNK_QUERIES] @ candidates.T
        positive = np.zeros(scores.shape, bool)
        in_chunk = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + _CHUNK_QUERIES)]
        positive[in_chunk[:, 0] - start, in_chunk[:, 1]] = True
        best = np.where(positive, scores, -np.inf).max(1, keepdims=True)
        ranks[start : start + _CHUNK_QUERIES] = 1 + (~(scores < best - _TOLERANCE) & ~positive).sum(1)
    return ranks


def recalls(ranks: Any, suffix: str = "") -> dict[str, float]:
    """Returns the fraction of ranks within each K of `RECALLS`, as `recall_at_K` with a suffix."""
    return {f"recall_at_{k}{suffix}": float((ranks <= k).mean()) for k in RECALLS}


class ImageTextRecall:
    """Recall@K in both directions, their mean, and median ranks, over all images and captions of a split.

    An image is one candidate, even if it has several rows. Each caption is a query for its image. The rank of an image
    query is that of the best of its captions (the usual definition). `best_ranks` resolves ties.
    """

    def __init__(self) -> None:
        self.images: dict[int, tuple[int, Any]] = {}
        """Row number and embedding [D] by image id."""
        self.texts: dict[int, tuple[int, Any]] = {}
        """Image id and caption embeddings [captions, D] by row number."""

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds `image_embeds` [B, D] and `text_embeds` ([B, D], or [B, W, D] with `texts` [B] valid captions each).

        The first column of `labels` holds image ids (`content_id`).
        """
        images = outputs["image_embeds"].float().cpu().numpy()
        texts = outputs["text_embeds"].float().cpu().numpy()
        texts = texts if texts.ndim == 3 else texts[:, None]
        counts = batch["texts"].tolist() if "texts" in batch else [1] * len(texts)
        rows = batch["index"].tolist() if "index" in batch else range(len(self.texts), len(self.texts) + len(texts))
        for i, (row, image) in enumerate(zip(rows, batch["labels"][:, 0].tolist(), strict=True)):
            self._add_image(image, row, images[i].copy())
            self.texts[row] = image, texts[i, : counts[i]].copy()

    def _add_image(self, image: int, row: int, embedding: Any) -> None:
        if image not in self.images or row < self.images[image][0]:
            self.images[image] = row, embedding

    def merge(self, other: ImageTextRecall) -> None:
        """Adds the rows of another process."""
        for image, (row, embedding) in other.images.items():
            self._add_image(image, row, embedding)
        self.texts |= other.texts

    def compute(self) -> dict[str, float]:
        """Returns `recall_at_K_image_to_text`, `recall_at_K_text_to_image`, `mean_recall` and median ranks."""
        by_row = sorted((row, image) for image, (row, _) in self.images.items())
        indices = {image: index for index, (_, image) in enumerate(by_row)}
        if not indices:
            undefined = np.full(1, np.nan)
            return self._scores(undefined, undefined)
        images = np.stack([self.images[image][1] for image in indices])
        rows = [self.texts[row] for row in sorted(self.texts)]
        texts = np.concatenate([embeddings for _, embeddings in rows])
        image_of_text = [indices[image] for image, embeddings in rows for _ in embeddings]
        to_text = best_ranks(images, texts, [(image, text) for text, image in enumerate(image_of_text)])
        to_image = best_ranks(texts, images, list(enumerate(image_of_text)))
        return self._scores(to_text, to_image)

    def _scores(self, to_text: Any, to_image: Any) -> dict[str, float]:
        scores = recalls(to_text, "_image_to_text") | recalls(to_image, "_text_to_image")
        return scores | {
            "mean_recall": float(np.mean(list(scores.values()))),
            "median_rank_image_to_text": float(np.median(to_text)),
            "median_rank_text_to_image": float(np.median(to_image)),
        }


class TextRecall:
    """Recall@K and mean reciprocal rank of the paired text among all second texts of a split.

    Equal texts are one query or one candidate. A query with several paired texts has the rank of the best of them.
    `best_ranks` resolves ties.
    """

    def __init__(self) -> None:
        self.sides: tuple[dict[int, Any], dict[int, Any]] = {}, {}
        """Embeddings [D] of first and of second texts by content id."""
        self.links: set[tuple[int, int]] = set()

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds `embedding` and `pair_embedding` [B, D]; `labels` [B, 2] holds the content ids of both texts."""
        ids = batch["labels"].T.tolist()
        for side, side_ids, output in zip(self.sides, ids, ("embedding", "pair_embedding"), strict=True):
            for text, embedding in zip(side_ids, outputs[output].float().cpu().numpy(), strict=True):
                side.setdefault(text, embedding.copy())
        self.links |= set(zip(*ids, strict=True))

    def merge(self, other: TextRecall) -> None:
        """Adds the rows of another process."""
        for side, other_side in zip(self.sides, other.sides, strict=True):
            for text, embedding in other_side.items():
                side.setdefault(text, embedding)
        self.links |= other.links

    def compute(self) -> dict[str, float]:
        """Returns `recall_at_K` and `mrr`; NaN without rows."""
        if not self.links:
            return {**recalls(np.full(1, np.nan)), "mrr": float("nan")}
        first, second = ({text: index for index, text in enumerate(sorted(side))} for side in self.sides)
        queries, candidates = (np.stack([side[text] for text in sorted(side)]) for side in self.sides)
        ranks = best_ranks(queries, candidates, [(first[query], second[text]) for query, text in self.links])
        return {**recalls(ranks), "mrr": float((1 / ranks).mean())}


class SimilarityCorrelation:
    """Spearman and Pearson correlation of cosines with similarity scores.

    Pairs are sorted before summation, so batches do not change the result.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Adds the cosines of `embedding` and `pair_embedding` [B, D], and scores `labels` [B]."""
        first, second = outputs["embedding"].double(), outputs["pair_embedding"].double()
        self.rows += zip((first * second).sum(-1).tolist(), batch["labels"].tolist(), strict=True)

    def merge(self, other: SimilarityCorrelation) -> None:
        """Adds the rows of another process."""
        self.rows += other.rows

    def compute(self) -> dict[str, float]:
        """Returns `spearman` and `pearson`; NaN if cosines or scores are constant, or cosines are not finite."""
        from scipy.stats import pearsonr, spearmanr

        cosines, scores = np.array(sorted(self.rows)).reshape(-1, 2).T
        is_defined = len(cosines) > 1 and np.isfinite(cosines).all() and np.ptp(cosines) > 0 and np.ptp(scores) > 0
        if not is_defined:
            return {"spearman": float("nan"), "pearson": float("nan")}
        results: dict[str, Any] = {"spearman": spearmanr(cosines, scores), "pearson": pearsonr(cosines, scores)}
        return {name: float(result.statistic) for name, result in results.items()}
