"""Backbone ranking by transferability scores of frozen features, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hftl.atomic_files import output_folder, write_text
from hftl.config.schema import DataConfig, ModelConfig, RunConfig
from hftl.data.splits import Splits
from hftl.data.usable_rows import load_usable_splits
from hftl.errors import ConfigError, ModelError, nearest, shorten
from hftl.features.labeled_features import LabelKind
from hftl.features.transferability import TRANSFERABILITY_SCORES
from hftl.launcher import build_accelerator
from hftl.logging import is_main_process, log, suppress_logs
from hftl.selection.bootstrap_ranks import Score, by_size, compare_scores
from hftl.selection.candidate import KINDS, LAYER_MEAN, Candidate, score_candidate
from hftl.selection.ranking_report import Ranking
from hftl.tasks.auto_task import infer_task
from hftl.tasks.task import SupervisedTask

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE = "linear probe"


def rank(
    source: str | DataConfig,
    models: Sequence[str] | str | Path,
    *,
    task: Callable[[Splits], SupervisedTask] | None = None,
    rows: int = 10_000,
    output: str | Path | None = "rank",
    explain: bool = False,
    by: str = REFERENCE,
    model: ModelConfig | None = None,
) -> Ranking:
    """Ranks candidate backbones by how well their frozen features predict the labels, and logs the table.

    Each candidate computes features of the same training rows once; they are cached. All transferability scores use
    these features, with bootstrap intervals of scores and ranks. Validation and test rows are not used. Text models are
    ranked by the mean of their layers, which predicts fine-tuned metrics better than the last layer (measurements in
    RESULTS.md); scores of the head input are reported as well.

    Args:
        source: Source as in `data.source`, or a data configuration.
        models: Names as in `model.name`, or one file with a name per line (# starts a comment).
        task: Custom task class; default: detected from the columns.
        rows: Maximum number of training rows, sampled with `data.seed`.
        output: Folder for rank.json and rank.html; None writes no files.
        explain: Also log assumptions and source of each score.
        by: Score to rank by.
        model: Settings shared by all candidates, such as `image_size`.

    Raises:
        ConfigError: No candidate is named, `by` does not apply to the labels, or `output` cannot be written.
        DataError: The rows are invalid.
        ModelError: No candidate could be scored. A candidate that fails among others is listed with its reason.
    """
    names = candidate_names(models)
    if by not in TRANSFERABILITY_SCORES:
        allowed = ", ".join(TRANSFERABILITY_SCORES)
        raise ConfigError(f"--by: '{by}' is invalid; allowed: {allowed}.{nearest(by, TRANSFERABILITY_SCORES)}")
    folder = None if output is None else output_folder(output)
    data = DataConfig(source=source) if isinstance(source, str) else source
    make = task or (lambda splits: infer_task(splits)(splits))
    splits, _ = load_usable_splits(data, make)
    bound = make(splits)
    kind = KINDS.get(bound.head.problem_type or "")
    if kind is None:
        raise ConfigError(
            f"task: '{bound.name}' has no transferability scores; allowed: tasks with a class, several labels or a "
            "number per row. Compare backbones with short runs (hftl compare)."
        )
    if kind not in TRANSFERABILITY_SCORES[by].kinds:
        raise ConfigError(f"--by: '{by}' does not support labels of kind '{kind}'. Set '{REFERENCE}'.")
    sample = _sample_rows(splits["train"], rows, data.seed)
    accelerator, candidates = build_accelerator(), []
    for position, name in enumerate(names, 1):
        run = RunConfig(data=data, model=replace(model or ModelConfig(), name=name))
        with suppress_logs():
            candidate = score_candidate(accelerator, run, bound, sample)
        candidates.append(candidate)
        head = candidate.views.get("head")
        outcome = f"forward pass took {head.forward_seconds:.1f} s" if head else f"skipped: {candidate.problem}"
        log(f"rank: {position}/{len(names)} {name}: {outcome}")
    if all(candidate.problem for candidate in candidates):
        raise ModelError(*(f"{candidate.name}: {candidate.problem}" for candidate in candidates))
    ranking = _rank_candidates(data, bound, kind, len(sample), by, candidates)
    _log_ranking(ranking, explain)
    if folder is not None and is_main_process():
        from hftl.selection.ranking_report import write_ranking_page

        write_text(folder / "rank.json", json.dumps(ranking.as_json(), indent=1) + "\n")
        log(f"rank: wrote {folder / 'rank.json'} and {write_ranking_page(ranking, folder / 'rank.html')}")
    return ranking


def candidate_names(models: Sequence[str] | str | Path) -> list[str]:
    """Returns the distinct names, read from a file if `models` is a file.

    Raises:
        ConfigError: There are no names, or the file cannot be read.
    """
    entries = [str(models)] if isinstance(models, (str, Path)) else [str(name) for name in models]
    if len(entries) == 1 and Path(entries[0]).is_file():
        try:
            lines = Path(entries[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--models: '{entries[0]}' cannot be read as text: {error}.") from error
        entries = [line.partition("#")[0] for line in lines]
    names = list(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))
    if not names:
        raise ConfigError("--models: contains no model name. Pass names, or a file with one name per line.")
    return names


def _sample_rows(train: Dataset, rows: int, seed: int) -> Dataset:
    """Returns a random sample of at most `rows` rows, in the order of the data."""
    if len(train) <= rows:
        return train
    import numpy as np

    return train.select(np.sort(np.random.default_rng(seed).permutation(len(train))[:rows]))


def _rank_candidates(
    data: DataConfig, task: SupervisedTask, kind: LabelKind, rows: int, by: str, candidates: list[Candidate]
) -> Ranking:
    layers = list(dict.fromkeys(layer for candidate in candidates for layer in candidate.views))
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    for layer in layers:
        views = {candidate.name: candidate.views[layer] for candidate in candidates if layer in candidate.views}
        compared = {
            estimator: compare_scores(
                {name: view.estimates[estimator] for name, view in views.items() if estimator in view.estimates},
                data.seed,
            )
            for estimator in TRANSFERABILITY_SCORES
        }
        scores[layer] = {estimator: by_candidate for estimator, by_candidate in compared.items() if by_candidate}
    scored = [candidate for candidate in candidates if not candidate.problem]
    have_means = all(LAYER_MEAN in candidate.views for candidate in scored) and by in scores.get(LAYER_MEAN, {})
    layer = LAYER_MEAN if have_means else "head"
    leading = scores[layer].get(by, {})
    if not leading:
        raise ConfigError(
            f"--by: no candidate has the score '{by}' (it may require a checkpoint with its pretrained head); allowed: "
            f"{', '.join(scores[layer])}."
        )

    def sort_key(candidate: Candidate) -> tuple[bool, int]:
        score = leading.get(candidate.name)
        return bool(candidate.problem), score.rank if score else len(candidates)

    ordered = sorted(candidates, key=sort_key)
    return Ranking(data.source, task.name, kind, rows, by, layer, ordered, scores, by_size(candidates))


def _log_ranking(ranking: Ranking, explain: bool) -> None:
    from hftl.selection.ranking_report import explanation, format_ranking

    log("\n" + format_ranking(ranking))
    if ranking.undecided:
        log(f"\nNot distinguishable from the first on these rows: {shorten(ranking.undecided)}.")
    log(f"Size baseline (most parameters first): {', '.join(ranking.by_size)}.")
    if explain:
        log("\n" + explanation(ranking))
