"""publish(): everything a run leaves behind, on disk."""

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
    """What a run found out."""

    report: ParameterCounts
    history: History
    metrics: dict[str, float]


def save_run(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    outcome: RunResult,
    *,
    page: bool = True,
) -> None:
    """Writes the run folder: config, environment, metrics, facts, the verified model with its card, and the page.

    Only the main process writes. Afterwards the model is on the CPU, with adapters merged. Where `run.hub` names
    a repository, the finished folder is pushed to it. `page=False` leaves report.html out, for one of many runs.

    Raises:
        ArtifactError: What was saved does not open, or computes something else than the trained model.
        DiskError: The disk does not take it.
        PushError: The hub did not take it; the folder is complete all the same.
    """
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    held_out = next(split for split in ("test", "validation", "train") if split in splits)
    few = splits[held_out].select(range(min(8, len(splits[held_out]))))
    sample = task.encode(few, model.processor, None, run.data.max_length)  # on all processes: tokenizing takes turns

    def write() -> None:
        _write(accelerator, model, task, splits, run, outcome, sample)
        if page:
            _draw(get_run_folder(run), splits)

    run_on_main(accelerator, write, folder=get_run_folder(run))
    with heartbeat_barrier("close the trackers"):
        _tell_trackers(accelerator, outcome)
    if run.hub.repo_id:
        push_once(accelerator, get_run_folder(run), run.hub)


def _write(
    accelerator: Accelerator,
    model: TaskModel,
    task: Task,
    splits: Splits,
    run: RunConfig,
    outcome: RunResult,
    sample: Examples,
) -> None:
    folder = get_run_folder(run)
    history = outcome.history
    write_text(folder / "metrics.json", json.dumps(finite(outcome.metrics), indent=2))
    write_text(folder / "environment.json", json.dumps(environment(accelerator), indent=2))
    report: dict[str, Any] = {
        "adapt": outcome.report.to_dict(),
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
    _dump(report, folder)  # before the comparison: a mismatch must not lose it
    report["verified"] = save_artifact(model, task, run, sample, folder)
    _dump(report, folder)
    record = RunRecord(folder)
    for part in record.parts:
        write_card(record, part, folder / part)
    _dump(report | {"complete": True}, folder)  # last: from here on `resume` has nothing to do
    log(f"publish: {folder}")


def _draw(folder: Path, splits: Splits) -> None:
    """Writes report.html. Everything else is on disk by now, so whatever goes wrong with a picture is only said."""
    try:
        log(f"report: {write_report(folder, splits=splits)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        log(f"report: not drawn ({reason}); the run is complete, `hftl report {folder}` tries again")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the most bytes that this process has held so far: resident, and allocated by torch on a CUDA device."""
    import torch

    found = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _tell_trackers(accelerator: Accelerator, outcome: RunResult) -> None:
    """Sends the test metrics, which came after training, and ends the trackers."""
    if not accelerator.trackers:
        return
    tests = {name: value for name, value in outcome.metrics.items() if name.startswith("test/")}
    if tests:
        accelerator.log(tests, step=outcome.history.steps)
    for tracker in accelerator.trackers:
        tracker.finish()  # end_training() would leave the process group too, and a push still needs it


def _class_counts(splits: Splits, task: Task) -> dict[str, dict[str, int]]:
    """Returns the rows of each class or label by split, for targets that count them."""
    count = getattr(getattr(task, "target", None), "counts", None)
    return {split: count(rows) for split, rows in splits.items()} if count else {}


def _command() -> str:
    """Returns how this process was started, as far as it can tell; the launcher's own options are not seen here."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        launcher = ["accelerate", "launch"]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    else:
        launcher = ["python"]
    return redact_tokens(shlex.join([*launcher, *sys.argv]))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Returns versions, devices and processes."""
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


def _dump(report: dict[str, Any], folder: Any) -> None:
    write_text(folder / "report.json", json.dumps(report, indent=2))
