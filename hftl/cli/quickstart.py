"""`hftl quickstart`: transfer learning compared with training from scratch, in a minute, offline."""

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

TrainingMethod = Literal["scratch", "frozen", "lora", "full"]
METHODS: tuple[TrainingMethod, ...] = ("scratch", "frozen", "lora", "full")
LABELS_PER_CLASS = 10
_TASK = "hftl.tasks.image_classification:ImageClassification"
_EPOCHS = 12
# tuned on digits; methods other than scratch differ by at most 1.3 points between the tried rates
_RATES = {"scratch": 2e-3, "frozen": 2e-2, "lora": 5e-3, "full": 2e-3}


def quickstart(
    output_dir: str | Path = "runs/quickstart", num_seeds: int = 3, overwrite: bool = False
) -> dict[str, float]:
    """Compares training from scratch with three adaptation methods on 100 labeled digits; saves the best run.

    Differs from `hftl compare` in the data: every seed samples its own 10 labels per class. All methods of a seed
    train on the same rows. The best run is selected on validation; the table shows test.

    Args:
        output_dir: Run folder of the best model.
        num_seeds: Runs per method, at least 1.
        overwrite: Replace an existing run folder.

    Returns:
        Mean test accuracy by method, in [0, 1].

    Raises:
        ConfigError: The run folder exists or cannot be written.
        ArtifactError: No run has a result.
        Stopped: A stop signal was received.
    """
    target = trial_config("full", "embedded:letters", 0, output_dir, overwrite)
    problems = folder_problems(target)
    if problems:
        raise ConfigError(*problems)
    log(
        f"Handwritten digits, {LABELS_PER_CLASS} labels per class; "
        "backbone: a small network (test_resnet) pretrained on letters.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = quickstart_plan("embedded:letters", num_seeds, Path(folder))
        comparison = run_plan(plan)
        runs = {Path(run.output_dir or "").name: run for method_runs in plan.runs.values() for run in method_runs}
        best = runs[comparison.kept or ""]
        saved = replace(best, output_dir=str(output_dir), overwrite=overwrite)
        run_in_child(save_best_run, best, saved, log=Path(folder) / "saved")
    attach(comparison, Path(output_dir))
    method = next(result.method for result in comparison.results if comparison.kept in result.runs)
    log(
        f"\nSaved: {method}, seed {best.train.seed} (best on validation), in {output_dir}\n"
        'Load it with timm, transformers (pipeline("image-classification", …)) or hftl. Next:\n\n'
        f"  hftl evaluate {output_dir}\n"
        "  hftl compare path/to/images --model resnet18.a1_in1k\n"
        "  hftl run image_classification --data.source path/to/images "
        "--model.name resnet18.a1_in1k --adapt.method lora\n"
    )
    return {result.method: result.score for result in comparison.results}


def quickstart_plan(model: str, num_seeds: int, folder: Path) -> ExperimentPlan:
    """Returns the plan of the quickstart, with run folders in `folder`."""
    runs = {
        method: [trial_config(method, model, seed, folder / f"{method}-s{seed}", False) for seed in range(num_seeds)]
        for method in METHODS
    }
    budget = f"{_EPOCHS} epochs on {LABELS_PER_CLASS} rows per class, sampled for each seed, for every method"
    return ExperimentPlan({str(method): of_method for method, of_method in runs.items()}, _TASK, budget, "test")


def save_best_run(trial: RunConfig, run: RunConfig) -> None:
    """Copies the checkpoints of a trial to the run folder of `run` and saves the model there.

    Call it in a separate process: the process locks the run folder until it ends.
    """
    source, target = Path(trial.output_dir or ""), Path(run.output_dir or "")
    make_folder(target, run)
    for name in ("config.yaml", "history.jsonl"):
        shutil.copy(source / name, target / name)
    if (source / "checkpoints").is_dir():
        shutil.copytree(source / "checkpoints", target / "checkpoints", dirs_exist_ok=True)
    train(replace(run, overwrite=False, resume="auto"), _TASK)


def trial_config(method: TrainingMethod, model: str, seed: int, output_dir: str | Path, overwrite: bool) -> RunConfig:
    """Returns the configuration of one run, as written to its `config.yaml`."""
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
