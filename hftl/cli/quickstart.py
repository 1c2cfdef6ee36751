"""`hftl quickstart`: what transfer learning is for, measured in the first minute, without a network."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hftl.config.schema import AdaptConfig, AugmentConfig, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from hftl.errors import ConfigError
from hftl.logging import log
from hftl.run.child_process import run_in_child
from hftl.run_folder.folder import folder_problems, make_folder
from hftl.selection.comparison import attach, run_plan
from hftl.selection.experiment_plan import ExperimentPlan
from hftl.selection.trial import train

Compared = Literal["scratch", "frozen", "lora", "full"]
METHODS: tuple[Compared, ...] = ("scratch", "frozen", "lora", "full")
LABELS_PER_CLASS = 10
_TASK = "hftl.tasks.image_classification:ImageClassification"
_EPOCHS = 12
# The same number of epochs for all. Rates come from an exploration on digits; methods other than scratch moved by
# 1.3 points at most between them.
_RATES = {"scratch": 2e-3, "frozen": 2e-2, "lora": 5e-3, "full": 2e-3}


def quickstart(output_dir: str | Path = "runs/quickstart", seeds: int = 3, overwrite: bool = False) -> dict[str, float]:
    """Compares training from scratch with three ways of transfer on 100 labelled digits, and keeps the best run.

    As `hftl compare` does, but that every seed draws its own 10 labels per class; all methods of a seed train on the
    same rows. The run that is kept is chosen on validation; the table shows test.

    Returns:
        Mean test accuracy by method.
    """
    target = trial_config("full", "embedded:letters", 0, output_dir, overwrite)
    problems = folder_problems(target)
    if problems:
        raise ConfigError(*problems)
    log(
        f"Handwritten digits, {LABELS_PER_CLASS} labels per class; "
        "a small network (test_resnet) that has learnt to read letters.\n"
    )
    with tempfile.TemporaryDirectory() as aside:
        plan = quickstart_plan("embedded:letters", seeds, Path(aside))
        found = run_plan(plan)
        runs = {Path(run.output_dir or "").name: run for of_method in plan.trainings.values() for run in of_method}
        best = runs[found.kept or ""]
        run_in_child(
            keep, best, replace(best, output_dir=str(output_dir), overwrite=overwrite), log=Path(aside) / "kept"
        )
    attach(found, Path(output_dir))
    method = next(result.method for result in found.results if found.kept in result.runs)
    log(
        f"\nKept: {method}, seed {best.train.seed} (best on validation), in {output_dir}\n"
        'It opens with timm, with transformers\' pipeline("image-classification", …) and with hftl. Next:\n\n'
        f"  hftl evaluate {output_dir}\n"
        "  hftl compare path/to/images --model resnet18.a1_in1k\n"
        "  hftl run image_classification --data.source path/to/images "
        "--model.name resnet18.a1_in1k --adapt.method lora\n"
    )
    return {result.method: result.score for result in found.results}


def quickstart_plan(model: str, seeds: int, folder: Path) -> ExperimentPlan:
    """Returns the trainings that are compared, with run folders in `folder`."""
    trainings = {
        method: [trial_config(method, model, seed, folder / f"{method}-s{seed}", False) for seed in range(seeds)]
        for method in METHODS
    }
    budget = f"{_EPOCHS} passes over {LABELS_PER_CLASS} rows per class, drawn anew for each seed, for every method"
    return ExperimentPlan({str(method): runs for method, runs in trainings.items()}, _TASK, budget, "test")


def keep(trial: RunConfig, run: RunConfig) -> None:
    """Takes the trained weights of one run folder to another, where `run` wants them, and publishes them there.

    To be called in a process of its own: it holds the folder until it ends.
    """
    source, target = Path(trial.output_dir or ""), Path(run.output_dir or "")
    make_folder(target, run)
    for name in ("config.yaml", "history.jsonl"):
        shutil.copy(source / name, target / name)
    if (source / "checkpoints").is_dir():
        shutil.copytree(source / "checkpoints", target / "checkpoints", dirs_exist_ok=True)
    train(replace(run, overwrite=False, resume="auto"), _TASK)


def trial_config(method: Compared, model: str, seed: int, output_dir: str | Path, overwrite: bool) -> RunConfig:
    """Returns the configuration of one training: the one that `config.yaml` in the run folder shows."""
    scratch = method == "scratch"
    return RunConfig(
        data=DataConfig(
            source="embedded:digits",
            max_train_samples_per_class=LABELS_PER_CLASS,
            seed=seed,
            augment=AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0),
        ),
        model=ModelConfig(name=model, pretrained=not scratch),
        adapt=AdaptConfig(method="full" if scratch else method, lora=LoraConfig(r=8, alpha=16.0)),
        train=TrainConfig(
            num_epochs=_EPOCHS,
            lr=_RATES[method],
            head_lr=_RATES[method],
            batch_size_per_device=20,
            eval_steps=50,
            logging_steps=50,
            seed=seed,
            trackers=[],
        ),
        output_dir=str(output_dir),
        overwrite=overwrite,
    )
