"""Which backbone? Candidates compared by what their frozen features say of the rows, without training any."""

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
    """Returns the candidates ordered by how well their frozen features predict the labels, and prints the table.

    Every candidate sees the same training rows once; its features stay in the cache. All estimators are computed from
    them, with intervals and ranks over resampled rows. Validation and test rows are not looked at. Text models are
    ordered by the mean of their layers, which in measurements (RESULTS.md) foretold fine-tuning better than the last
    one; the scores of the head's own input stand beside it.

    Args:
        source: Rows, as `data.source`, or a whole data section.
        models: Names as `model.name`, or one file with a name on each line (# begins a comment).
        task: Class of a task of your own; images or texts with one class a row are recognised by their columns.
        rows: Training rows to use at most, drawn by `data.seed`.
        output: Folder for rank.json and rank.html; None writes nothing.
        explain: Also prints what each estimator assumes and where it comes from.
        by: Estimator that orders the table.
        model: Settings that all candidates share, such as `image_size`.

    Raises:
        ConfigError: Nothing is named, `by` is no estimator for such labels, or `output` cannot be written.
        DataError: The rows cannot be used.
        ModelError: No candidate at all could be scored. One that fails among others is a row with its reason.
    """
    names = candidate_names(models)
    if by not in TRANSFERABILITY_SCORES:
        raise ConfigError(
            f"--by: '{by}' is not one of {', '.join(TRANSFERABILITY_SCORES)}.{nearest(by, TRANSFERABILITY_SCORES)}"
        )
    folder = None if output is None else output_folder(output)
    data = DataConfig(source=source) if isinstance(source, str) else source
    make = task or (lambda splits: infer_task(splits)(splits))
    splits, _ = load_usable_splits(data, make)
    built = make(splits)
    kind = KINDS.get(built.head.problem_type or "")
    if kind is None:
        raise ConfigError(
            f"rank: a row of {built.name} has no one label or number, which the scores look at; compare backbones by "
            "short trainings (hftl compare), or rank them on a classification of the same rows."
        )
    if kind not in TRANSFERABILITY_SCORES[by].kinds:
        raise ConfigError(f"--by: {by} is not defined for labels of this kind ({kind}); say {REFERENCE}.")
    used = _some(splits["train"], rows, data.seed)
    accelerator, candidates = build_accelerator(), []
    for number, name in enumerate(names, 1):
        run = RunConfig(data=data, model=replace(model or ModelConfig(), name=name))
        with suppress_logs():
            found = score_candidate(accelerator, run, built, used)
        candidates.append(found)
        head = found.views.get("head")
        said = f"{head.forward_seconds:.1f} s forward" if head else f"left out: {found.problem}"
        log(f"rank: {number}/{len(names)} {name}: {said}")
    if all(candidate.problem for candidate in candidates):
        raise ModelError(*(f"{candidate.name}: {candidate.problem}" for candidate in candidates))
    ranking = _ranked(data, built, kind, len(used), by, candidates)
    _show(ranking, explain)
    if folder is not None and is_main_process():
        from hftl.selection.ranking_report import write_ranking_page

        write_text(folder / "rank.json", json.dumps(ranking.as_json(), indent=1) + "\n")
        log(f"written: {folder / 'rank.json'}, {write_ranking_page(ranking, folder / 'rank.html')}")
    return ranking


def candidate_names(models: Sequence[str] | str | Path) -> list[str]:
    """Returns the names, each once, read from a file where `models` is one.

    Raises:
        ConfigError: There is none, or the file cannot be read.
    """
    given = [str(models)] if isinstance(models, (str, Path)) else [str(name) for name in models]
    if len(given) == 1 and Path(given[0]).is_file():
        try:
            lines = Path(given[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--models: '{given[0]}' cannot be read as text: {error}.") from error
        given = [line.partition("#")[0] for line in lines]
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise ConfigError("--models: no name of a model; say names, or a file with one on each line.")
    return names


def _some(train: Dataset, rows: int, seed: int) -> Dataset:
    """Returns at most `rows` rows, drawn by seed, in their order."""
    if len(train) <= rows:
        return train
    import numpy as np

    chosen = np.sort(np.random.default_rng(seed).permutation(len(train))[:rows])
    return train.select(chosen)


def _ranked(
    data: DataConfig, task: SupervisedTask, kind: LabelKind, rows: int, by: str, candidates: list[Candidate]
) -> Ranking:
    places = list(dict.fromkeys(place for candidate in candidates for place in candidate.views))
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    for place in places:
        views = {candidate.name: candidate.views[place] for candidate in candidates if place in candidate.views}
        each = {
            estimator: compare_scores(
                {name: view.estimates[estimator] for name, view in views.items() if estimator in view.estimates},
                data.seed,
            )
            for estimator in TRANSFERABILITY_SCORES
        }
        scores[place] = {estimator: found for estimator, found in each.items() if found}
    scored = [candidate for candidate in candidates if not candidate.problem]
    means = all(LAYER_MEAN in candidate.views for candidate in scored) and by in scores.get(LAYER_MEAN, {})
    place = LAYER_MEAN if means else "head"
    leading = scores[place].get(by, {})
    if not leading:
        computed = ", ".join(scores[place])
        raise ConfigError(
            f"--by: no candidate has a score of {by} here (it may need a checkpoint with the head of its source); "
            f"computed: {computed}."
        )

    def position(candidate: Candidate) -> tuple[bool, int]:
        score = leading.get(candidate.name)
        return bool(candidate.problem), score.rank if score else len(candidates)

    ordered = sorted(candidates, key=position)
    return Ranking(data.source, task.name, kind, rows, by, place, ordered, scores, by_size(candidates))


def _show(ranking: Ranking, explain: bool) -> None:
    from hftl.selection.ranking_report import explanation, format_ranking

    log("\n" + format_ranking(ranking))
    if ranking.undecided:
        log(f"\nNot distinguishable from the first on these rows: {shorten(ranking.undecided)}.")
    log(f"By size alone, the baseline to beat: {', '.join(ranking.by_size)}.")
    if explain:
        log("\n" + explanation(ranking))
