"""Losses that compare rows with each other, and how retrieval is measured: against plain references."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hftl.models.oom_retry import MicroBatchLimit
from hftl.tasks.targets.embedding.contrastive_losses import Pairs, content_id, cosent, info_nce, sigmoid_loss
from hftl.tasks.targets.embedding.metrics import ImageTextRecall, SimilarityCorrelation, TextRecall, best_ranks


def unit(rows, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, size, generator=generator), dim=-1)


def pairs(rows=6, seed=0, **changes):
    ids = torch.arange(rows)
    return Pairs(**{"first": unit(rows, seed=seed), "second": unit(rows, seed=seed + 1), "first_ids": ids} | {
        "second_ids": ids + 100, "weight": None, **changes
    })  # fmt: skip


def test_infonce_is_the_mean_of_two_cross_entropies():
    given = pairs()
    logits = 14.0 * given.first @ given.second.T
    target = torch.arange(6)
    expected = (
        functional.cross_entropy(logits, target, reduction="none")
        + functional.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    assert torch.allclose(info_nce(given, 14.0), expected, atol=1e-6)


def test_the_sigmoid_loss_is_a_binary_cross_entropy_of_each_combination():
    given = pairs()
    logits = 10.0 * given.first @ given.second.T - 10.0
    expected = functional.binary_cross_entropy_with_logits(logits, torch.eye(6), reduction="none").sum(1)
    assert torch.allclose(sigmoid_loss(given, 10.0, -10.0), expected, atol=1e-6)


def test_cosent_counts_only_cosines_of_rows_with_lower_scores():
    cosines, scores = torch.tensor([0.1, 0.5, 0.3, 0.9]), torch.tensor([0.0, 1.0, 0.5, 0.5])
    expected = [
        math.log(1 + sum(math.exp(20 * float(cosines[j] - cosines[i])) for j in range(4) if scores[j] < scores[i]))
        for i in range(4)
    ]
    assert cosent(cosines, scores).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert cosent(cosines, scores)[0] == 0  # nothing scores lower


@pytest.mark.parametrize("loss", [lambda p: info_nce(p, 14.0), lambda p: sigmoid_loss(p, 10.0, -10.0)])
def test_what_shares_an_image_or_a_text_and_what_counts_nothing_is_no_negative(loss):
    """Row 1 has the image of row 0, row 2 the caption of row 0, row 5 counts nothing: as if row 0 did not meet them."""
    first_ids, second_ids = torch.tensor([0, 0, 2, 3, 4, 5]), torch.tensor([9, 8, 9, 7, 6, 5])
    whole = pairs(first_ids=first_ids, second_ids=second_ids, weight=torch.tensor([1.0, 1, 1, 1, 1, 0]))
    kept = torch.tensor([0, 3, 4])
    few = Pairs(whole.first[kept], whole.second[kept], first_ids[kept], second_ids[kept])
    assert torch.allclose(loss(whole)[0], loss(few)[0], atol=1e-6)
    assert torch.isfinite(loss(whole)).all()


def test_identity_tells_contents_apart_and_fits_int64():
    found = {content_id(f"caption {number}") for number in range(1000)}
    assert len(found) == 1000 and content_id("a") == content_id(b"a")
    assert torch.tensor(sorted(found)).dtype == torch.int64


def naive_ranks(queries, candidates, right):
    """Rank of the best right candidate by a loop over everything; ties count against it."""
    out = []
    for query, own in zip(np.float64(queries), right, strict=True):
        scores = [float(query @ candidate) for candidate in np.float64(candidates)]
        best = max(scores[number] for number in own)
        out.append(1 + sum(score >= best - 1e-12 for number, score in enumerate(scores) if number not in own))
    return np.array(out)


def retrieval_batches(captions, images=40, seed=0):
    """Batches of an uneven size each, with several captions an image (3-D) or one a row, images occurring again."""
    generator = torch.Generator().manual_seed(seed)
    whole_images, start = unit(images, 6, seed), 0
    while start < images:
        size = min(1 + start % 7, images - start)
        rows = torch.arange(start, start + size)
        keys = rows if captions > 1 else rows // 3  # three rows an image where each row has one caption
        counts = torch.randint(1, captions + 1, (size,), generator=generator)
        texts = functional.normalize(torch.randn(size, captions, 6, generator=generator), dim=-1)
        batch = {"index": rows, "labels": torch.stack([keys, keys + 1000], 1)}
        outputs = {"image_embeds": whole_images[keys], "text_embeds": texts if captions > 1 else texts[:, 0]}
        yield outputs, batch | ({"texts": counts} if captions > 1 else {})
        start += size


@pytest.mark.parametrize("captions", [1, 3])
def test_image_text_recall_equals_a_plain_reference_however_it_is_cut_and_merged(captions):
    batches = list(retrieval_batches(captions))
    images, texts, owners = {}, [], []
    for outputs, batch in batches:
        counts = batch["texts"].tolist() if "texts" in batch else [1] * len(batch["index"])
        for row, key in enumerate(batch["labels"][:, 0].tolist()):
            images.setdefault(key, outputs["image_embeds"][row].numpy())
            several = outputs["text_embeds"][row].reshape(-1, 6)[: counts[row]]
            texts += list(several.numpy())
            owners += [key] * counts[row]
    names = list(images)
    own = [[number for number, owner in enumerate(owners) if owner == name] for name in names]
    to_text = naive_ranks(list(images.values()), texts, own)
    to_image = naive_ranks(texts, list(images.values()), [[names.index(owner)] for owner in owners])
    expected = {"median_rank_image_to_text": np.median(to_text), "median_rank_text_to_image": np.median(to_image)}
    for k in (1, 5, 10):
        expected[f"recall_at_{k}_image_to_text"] = np.mean(to_text <= k)
        expected[f"recall_at_{k}_text_to_image"] = np.mean(to_image <= k)
    expected["mean_recall"] = np.mean([value for name, value in expected.items() if "recall" in name])

    one, two = ImageTextRecall(), ImageTextRecall()
    for number, (outputs, batch) in enumerate(batches):
        (one if number % 3 else two).update(outputs, batch)
    two.merge(one)
    found = two.compute()
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], abs=1e-6) for name in expected)


def test_ties_and_numbers_that_are_none_are_ranked_last():
    same = np.ones((4, 3)) / math.sqrt(3)
    links = [(number, number) for number in range(4)]
    assert best_ranks(same, same, links).tolist() == [4, 4, 4, 4]
    assert best_ranks(np.full((4, 3), np.nan), same, links).tolist() == [4, 4, 4, 4]


def test_text_recall_knows_texts_that_occur_again():
    """An anchor with two right texts is right with either; equal texts are one candidate."""
    first, second = unit(4, seed=3), unit(4, seed=4)
    rows = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 3)]
    metric, other = TextRecall(), TextRecall()
    for number, (one, two) in enumerate(rows):
        outputs = {"embedding": first[one : one + 1], "pair_embedding": second[two : two + 1]}
        (metric if number % 2 else other).update(outputs, {"labels": torch.tensor([[one, 100 + two]])})
    metric.merge(other)
    ranks = naive_ranks(first.numpy(), second.numpy(), [[0, 1], [2], [3], [3]])
    found = metric.compute()
    assert found["mrr"] == pytest.approx(np.mean(1 / ranks), abs=1e-6)
    assert found["recall_at_1"] == pytest.approx(np.mean(ranks <= 1), abs=1e-6)


def test_correlations_are_scipys_on_any_batches():
    from scipy.stats import pearsonr, spearmanr

    first, second, scores = unit(50, seed=5), unit(50, seed=6), torch.rand(50).round(decimals=1)
    cosines = (first.double() * second.double()).sum(-1)
    metric, other = SimilarityCorrelation(), SimilarityCorrelation()
    for start, end, into in ((0, 7, metric), (7, 8, other), (8, 40, other), (40, 50, metric)):
        outputs = {"embedding": first[start:end], "pair_embedding": second[start:end]}
        into.update(outputs, {"labels": scores[start:end]})
    metric.merge(other)
    found = metric.compute()
    assert found["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-6)
    assert found["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-6)
    assert math.isnan(SimilarityCorrelation().compute()["spearman"])


def test_rows_that_are_compared_are_not_taken_fewer_at_a_time():
    def attempt():
        raise torch.OutOfMemoryError("out of memory (injected)")

    with pytest.raises(Exception, match="compares the rows of a batch"):
        MicroBatchLimit("training", whole=True).retrying(attempt, lambda: 8)
