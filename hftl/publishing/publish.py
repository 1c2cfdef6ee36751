"""publish(): everything a run leaves behind, on disk."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hftl.adaptation.report import AdaptReport
from hftl.config.schema import RunConfig
from hftl.console import say
from hftl.data.loader import Rows
from hftl.data.source import Splits
from hftl.models.parts import TaskModel
from hftl.publishing.artifact import save_artifact
from hftl.publishing.card import write_card
from hftl.tasks.task import Task
from hftl.train.history import History, finite
from hftl.train.start import run_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = (
    "hftl",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "scikit-learn",
)


@dataclass(frozen=True)
class Outcome:
    """What a run found out."""

    report: AdaptReport
    history: History
    metrics: dict[str, float]


def publish(
    accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig, outcome: Outcome
) -> None:
    """Writes the run folder: config, environment, metrics, report, and the verified model with its card.

    Only the main process writes. Afterwards the model is on the CPU, with adapters merged.

    Raises:
        ArtifactError: What was saved does not open, or computes something else than the trained model.
    """
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    held_out = next(split for split in ("test", "validation", "train") if split in splits)
    few = splits[held_out].select(range(min(8, len(splits[held_out]))))
    sample = task.encode(few, model.processor, None, run.data.max_length)  # on all processes: tokenizing takes turns
    if accelerator.is_main_process:
        _write(accelerator, model, task, splits, run, outcome, sample)
    accelerator.wait_for_everyone()


def _write(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    outcome: Outcome,
    sample: Rows,
) -> None:
    folder = run_folder(run)
    history = outcome.history
    (folder / "metrics.json").write_text(json.dumps(finite(outcome.metrics), indent=2))
    (folder / "environment.json").write_text(json.dumps(environment(accelerator), indent=2))
    report: dict[str, Any] = {
        "adapt": outcome.report.to_dict(),
        "training": {"steps": history.steps, "seconds": round(history.seconds, 2), "best": history.best},
        "rows": {split: len(rows) for split, rows in splits.items()},
    }
    _dump(report, folder)  # before the comparison: a mismatch must not lose it
    report["verified"] = save_artifact(model, task, run, sample, folder)
    _dump(report, folder)
    facts = {
        "rows": ", ".join(f"{split} {count}" for split, count in report["rows"].items()),
        "parameters": str(outcome.report).removeprefix("adapt: "),
        "steps": f"{history.steps} in {history.seconds:.0f} s on {accelerator.num_processes} x {_device(accelerator)}, "
        f"precision {accelerator.mixed_precision}, seed {run.train.seed}",
        "kept": "{metric} {value:.4f} at step {step}".format(**history.best) if history.best else "the last weights",
        "largest logit difference after saving": ", ".join(
            f"{name} {value:.2g}" for name, value in report["verified"].items()
        ),
        "versions": ", ".join(f"{name} {number}" for name, number in environment(accelerator)["packages"].items()),
    }
    for part in ("model", "adapter"):
        if (folder / part).is_dir():
            write_card(folder / part, model, task, run, outcome.metrics, facts)
    say(f"publish: {folder}")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Returns versions, devices and processes."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(accelerator),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "distributed": str(accelerator.distributed_type.value),
        "packages": packages,
    }


def _device(accelerator: Accelerator) -> str:
    import torch

    return (
        torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type
    )


def _dump(report: dict[str, Any], folder: Any) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=2))
