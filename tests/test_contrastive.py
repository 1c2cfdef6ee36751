"""Contrastive losses and retrieval metrics, against direct reference implementations."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hftl.models.oom_retry import MicroBatchLimit
from hftl.tasks.targets.embedding.contrastive_losses import Pairs, content_id, cosent, info_nce, sigmoid_loss
from hftl.tasks.targets.embedding.metrics import ImageTextRecall, SimilarityCorrelation, TextRecall, best_ranks


def unit_vectors(rows, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, size, generator=generator), dim=-1)


def make_pairs(rows=6, seed=0, **changes):
    ids = torch.arange(rows)
    embeddings = {"first": unit_vectors(rows, seed=seed), "second": unit_vectors(rows, seed=seed + 1)}
    return Pairs(**embeddings | {"first_ids": ids, "second_ids": ids + 100, "weight": None, **changes})


def test_info_nce_matches_mean_of_two_cross_entropies():
    pairs = make_pairs()
    logits = 14.0 * pairs.first @ pairs.second.T
    target = torch.arange(6)
    expected = (
        functional.cross_entropy(logits, target, reduction="none")
        + functional.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    assert torch.allclose(info_nce(pairs, 14.0), expected, atol=1e-6)


def test_sigmoid_loss_matches_summed_binary_cross_entropy():
    pairs = make_pairs()
    logits = 10.0 * pairs.first @ pairs.second.T - 10.0
    expected = functional.binary_cross_entropy_with_logits(logits, torch.eye(6), reduction="none").sum(1)
    assert torch.allclose(sigmoid_loss(pairs, 10.0, -10.0), expected, atol=1e-6)


def test_cosent_compares_rows_with_lower_scores_only():
    cosines, scores = torch.tensor([0.1, 0.5, 0.3, 0.9]), torch.tensor([0.0, 1.0, 0.5, 0.5])
    expected = [
        math.log(1 + sum(math.exp(20 * float(cosines[j] - cosines[i])) for j in range(4) if scores[j] < scores[i]))
        for i in range(4)
    ]
    assert cosent(cosines, scores).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert cosent(cosines, scores)[0] == 0  # nothing scores lower


@pytest.mark.parametrize("loss", [lambda p: info_nce(p, 14.0), lambda p: sigmoid_loss(p, 10.0, -10.0)])
def test_contrastive_loss_ignores_duplicates_and_padding(loss):
    """Row 1 shares the image of row 0, row 2 its caption, row 5 is padding: none is a negative of row 0."""
    first_ids, second_ids = torch.tensor([0, 0, 2, 3, 4, 5]), torch.tensor([9, 8, 9, 7, 6, 5])
    pairs = make_pairs(first_ids=first_ids, second_ids=second_ids, weight=torch.tensor([1.0, 1, 1, 1, 1, 0]))
    negatives = torch.tensor([0, 3, 4])
    reduced = Pairs(pairs.first[negatives], pairs.second[negatives], first_ids[negatives], second_ids[negatives])
    assert torch.allclose(loss(pairs)[0], loss(reduced)[0], atol=1e-6)
    assert torch.isfinite(loss(pairs)).all()


def test_content_id_returns_distinct_int64_values():
    ids = {content_id(f"caption {number}") for number in range(1000)}
    assert len(ids) == 1000 and content_id("a") == content_id(b"a")
    assert torch.tensor(sorted(ids)).dtype == torch.int64


def naive_ranks(queries, candidates, positives):
    """Returns the rank of the best positive candidate per query by a loop; ties count as ranked before it."""
    ranks = []
    for query, own in zip(np.float64(queries), positives, strict=True):
        scores = [float(query @ candidate) for candidate in np.float64(candidates)]
        best = max(scores[number] for number in own)
        ranks.append(1 + sum(score >= best - 1e-12 for number, score in enumerate(scores) if number not in own))
    return np.array(ranks)


def retrieval_batches(captions, images=40, seed=0):
    """Yields batches of different sizes, with several captions per image (3-D) or one per row (images repeat)."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, start = unit_vectors(images, 6, seed), 0
    while start < images:
        size = min(1 + start % 7, images - start)
        rows = torch.arange(start, start + size)
        keys = rows if captions > 1 else rows // 3  # three rows per image if each row has one caption
        counts = torch.randint(1, captions + 1, (size,), generator=generator)
        texts = functional.normalize(torch.randn(size, captions, 6, generator=generator), dim=-1)
        batch = {"index": rows, "labels": torch.stack([keys, keys + 1000], 1)}
        outputs = {"image_embeds": embeddings[keys], "text_embeds": texts if captions > 1 else texts[:, 0]}
        yield outputs, batch | ({"texts": counts} if captions > 1 else {})
        start += size


@pytest.mark.parametrize("captions", [1, 3])
def test_image_text_recall_matches_loop_over_any_batches(captions):
    batches = list(retrieval_batches(captions))
    images, texts, image_of_text = {}, [], []
    for outputs, batch in batches:
        counts = batch["texts"].tolist() if "texts" in batch else [1] * len(batch["index"])
        for row, key in enumerate(batch["labels"][:, 0].tolist()):
            images.setdefault(key, outputs["image_embeds"][row].numpy())
            texts += list(outputs["text_embeds"][row].reshape(-1, 6)[: counts[row]].numpy())
            image_of_text += [key] * counts[row]
    keys = list(images)
    positives = [[number for number, image in enumerate(image_of_text) if image == key] for key in keys]
    to_text = naive_ranks(list(images.values()), texts, positives)
    to_image = naive_ranks(texts, list(images.values()), [[keys.index(image)] for image in image_of_text])
    expected = {"median_rank_image_to_text": np.median(to_text), "median_rank_text_to_image": np.median(to_image)}
    for k in (1, 5, 10):
        expected[f"recall_at_{k}_image_to_text"] = np.mean(to_text <= k)
        expected[f"recall_at_{k}_text_to_image"] = np.mean(to_image <= k)
    expected["mean_recall"] = np.mean([value for name, value in expected.items() if "recall" in name])

    metrics = [ImageTextRecall(), ImageTextRecall()]
    for number, (outputs, batch) in enumerate(batches):
        metrics[0 if number % 3 else 1].update(outputs, batch)
    metrics[1].merge(metrics[0])
    scores = metrics[1].compute()
    assert scores.keys() == expected.keys()
    assert all(scores[name] == pytest.approx(expected[name], abs=1e-6) for name in expected)


def test_best_ranks_with_ties_or_nan_returns_last_rank():
    equal = np.ones((4, 3)) / math.sqrt(3)
    links = [(number, number) for number in range(4)]
    assert best_ranks(equal, equal, links).tolist() == [4, 4, 4, 4]
    assert best_ranks(np.full((4, 3), np.nan), equal, links).tolist() == [4, 4, 4, 4]


def test_text_recall_merges_repeated_texts():
    """A query with two paired texts has the better rank; equal texts are one candidate."""
    first, second = unit_vectors(4, seed=3), unit_vectors(4, seed=4)
    pairs = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 3)]
    metrics = [TextRecall(), TextRecall()]
    for number, (query, text) in enumerate(pairs):
        outputs = {"embedding": first[query : query + 1], "pair_embedding": second[text : text + 1]}
        metrics[0 if number % 2 else 1].update(outputs, {"labels": torch.tensor([[query, 100 + text]])})
    metrics[0].merge(metrics[1])
    ranks = naive_ranks(first.numpy(), second.numpy(), [[0, 1], [2], [3], [3]])
    scores = metrics[0].compute()
    assert scores["mrr"] == pytest.approx(np.mean(1 / ranks), abs=1e-6)
    assert scores["recall_at_1"] == pytest.approx(np.mean(ranks <= 1), abs=1e-6)


def test_similarity_correlation_matches_scipy():
    from scipy.stats import pearsonr, spearmanr

    first, second = unit_vectors(50, seed=5), unit_vectors(50, seed=6)
    scores = torch.rand(50).round(decimals=1)
    cosines = (first.double() * second.double()).sum(-1)
    metrics = [SimilarityCorrelation(), SimilarityCorrelation()]
    for start, end, index in ((0, 7, 0), (7, 8, 1), (8, 40, 1), (40, 50, 0)):
        outputs = {"embedding": first[start:end], "pair_embedding": second[start:end]}
        metrics[index].update(outputs, {"labels": scores[start:end]})
    metrics[0].merge(metrics[1])
    correlations = metrics[0].compute()
    assert correlations["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-6)
    assert correlations["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-6)
    assert math.isnan(SimilarityCorrelation().compute()["spearman"])


def test_oom_with_batch_dependent_loss_raises():
    def attempt():
        raise torch.OutOfMemoryError("out of memory (injected)")

    with pytest.raises(Exception, match="compares the rows of a batch"):
        MicroBatchLimit("training", whole=True).retrying(attempt, lambda: 8)
