"""Saving of a finished run: metrics, environment, verified model with card, and report."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.adaptation.parameter_counts import ParameterCounts
from hftl.artifacts.model_card import write_card
from hftl.artifacts.push import push_once
from hftl.artifacts.save_model import save_artifact
from hftl.atomic_files import write_text
from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.data.validation import left_out
from hftl.distributed import heartbeat_barrier, run_on_main
from hftl.errors import first_line
from hftl.hub_client import redact_tokens
from hftl.loading.loader import Examples
from hftl.logging import log
from hftl.models.task_model import TaskModel
from hftl.reporting import write_report
from hftl.reporting.run_record import RunRecord
from hftl.run_folder.folder import get_run_folder
from hftl.run_folder.history import History, finite
from hftl.tasks.task import Task

if TYPE_CHECKING:
    import torch
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
    "skops",
)


@dataclass(frozen=True)
class RunResult:
    """Results of a run: parameter counts, training history and metrics."""

    report: ParameterCounts
    history: History
    metrics: dict[str, float]


def save_run(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    result: RunResult,
    *,
    page: bool = True,
) -> None:
    """Writes the run folder: metrics, environment, report.json, the verified model with its card, and report.html.

    Only the main process writes. Moves the model to the CPU and merges adapters. Pushes the finished folder if
    `run.hub.repo_id` is set.

    Args:
        accelerator: Accelerator of the run.
        model: Trained model.
        task: Task of the model.
        splits: Rows by split; the first 8 test (else validation, train) rows verify the saved model.
        run: Run configuration.
        result: Results of the run.
        page: Whether to write report.html; False for a run of a comparison.

    Raises:
        ArtifactError: The saved model cannot be loaded, or its logits differ from those of the trained model.
        DiskError: The run folder cannot be written.
        PushError: The push failed; the run folder is complete.
    """
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    held_out = next(split for split in ("test", "validation", "train") if split in splits)
    rows = splits[held_out].select(range(min(8, len(splits[held_out]))))
    sample = task.encode(rows, model.processor, None, run.data.max_length)  # collective: the main process encodes first

    def write() -> None:
        _write(accelerator, model, task, splits, run, result, sample)
        if page:
            _render_report(get_run_folder(run), splits)

    run_on_main(accelerator, write, folder=get_run_folder(run))
    with heartbeat_barrier("close the trackers"):
        _finish_trackers(accelerator, result)
    if run.hub.repo_id:
        push_once(accelerator, get_run_folder(run), run.hub)


def _write(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    result: RunResult,
    sample: Examples,
) -> None:
    folder = get_run_folder(run)
    history = result.history
    write_text(folder / "metrics.json", json.dumps(finite(result.metrics), indent=2))
    write_text(folder / "environment.json", json.dumps(environment(accelerator), indent=2))
    report: dict[str, Any] = {
        "adapt": result.report.to_dict(),
        "training": {
            "steps": history.steps,
            "skipped_steps": history.skipped,
            "seconds": round(history.seconds, 2),
            "best": history.best,
            **({"selection": history.selection} if history.selection else {}),
            **peak_memory(accelerator.device),
        },
        "rows": {split: len(rows) for split, rows in splits.items()},
        "left_out": left_out(run.quarantine),
        "classes": _class_counts(splits, task),
    }
    _write_facts(report, folder)  # before the verification, whose failure must not lose the results
    report["verified"] = save_artifact(model, task, run, sample, folder)
    _write_facts(report, folder)
    record = RunRecord(folder)
    for part in record.parts:
        write_card(record, part, folder / part)
    _write_facts(report | {"complete": True}, folder)  # written last: marks the run as complete for `resume`
    log(f"save: wrote {folder}")


def _render_report(folder: Path, splits: Splits) -> None:
    """Writes report.html; logs an error instead of raising it, as the run is already complete on disk."""
    try:
        log(f"report: wrote {write_report(folder, splits=splits)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        log(f"report: not written ({reason}); the run is complete. Run `hftl report {folder}` to try again")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the peak memory of this process in bytes: resident, and allocated by torch on a CUDA device."""
    import torch

    peaks = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _finish_trackers(accelerator: Accelerator, result: RunResult) -> None:
    """Logs the test metrics to the trackers and finishes them."""
    if not accelerator.trackers:
        return
    tests = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
    if tests:
        accelerator.log(tests, step=result.history.steps)
    for tracker in accelerator.trackers:
        tracker.finish()  # end_training() would also destroy the process group, which the push needs


def _class_counts(splits: Splits, task: Task) -> dict[str, dict[str, int]]:
    """Returns the number of rows per class or label by split; empty for targets without classes."""
    count = getattr(getattr(task, "target", None), "counts", None)
    return {split: count(rows) for split, rows in splits.items()} if count else {}


def _command() -> str:
    """Returns the command of this process; options of the launcher itself are unknown to its child processes."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        launcher = ["accelerate", "launch"]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    else:
        launcher = ["python"]
    return redact_tokens(shlex.join([*launcher, *sys.argv]))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Returns command, package versions, device, precision and processes, as written to environment.json."""
    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(accelerator),
        "processes": accelerator.num_processes,
        "cpu_threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "distributed": str(accelerator.distributed_type.value),
        "packages": packages,
    }


def _device(accelerator: Accelerator) -> str:
    import torch

    return (
        torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type
    )


def _write_facts(report: dict[str, Any], folder: Any) -> None:
    write_text(folder / "report.json", json.dumps(report, indent=2))
