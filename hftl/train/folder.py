"""The run folder: what may be written there, what is there already, and whether a run there can go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hftl.config.defaults import default_folder
from hftl.config.parse import load
from hftl.config.schema import RunConfig, leaves
from hftl.data.quarantine import FILE as QUARANTINE
from hftl.errors import HftlError, first_line, shorten
from hftl.hub import redacted
from hftl.train.checkpoint import clear_partial

RUN_FILES = ("config.yaml", QUARANTINE, "history.jsonl", "metrics.json", "model", "adapter", "checkpoints")
"""What a run leaves in its folder; `--overwrite` removes these."""
MARKER = "config.yaml"
"""Written first: only a folder that has it is ever cleared."""
MAY_CHANGE = (
    "checkpoint.", "data.num_workers", "data.worker_timeout", "output_dir", "overwrite", "publish.", "resume",
    "train.batch_size_per_device", "train.gradient_accumulation_steps", "train.log_every", "train.max_nonfinite",
    "train.on_", "train.timeout_minutes", "train.trackers",
)  # fmt: skip
"""Settings that may differ when a run goes on. The rows of a step stay as they were, whatever batches it is made of."""


def run_folder(run: RunConfig) -> Path:
    """Returns the run folder."""
    return Path(run.output_dir or default_folder(run))


def folder_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder cannot be written or holds a run that may not be replaced."""
    folder = run_folder(run)
    if run.overwrite and run.resume == "auto":
        return ["resume: 'auto' goes on with what is in the run folder and overwrite removes it; choose one."]
    inputs = {"model.name": run.model.name.removeprefix("local-dir:"), "data.source": run.data.source}
    try:
        problems = _folder_problems(folder, replaceable=run.overwrite or run.resume == "auto")
        for name, value in inputs.items() if not problems else ():
            path = Path(value).resolve()
            if value and path.exists() and folder.resolve() in (path, *path.parents):
                return [f"output_dir: '{folder}' holds {name} ('{value}'); choose a folder outside of it."]
        return problems
    except OSError as error:
        return [f"output_dir: '{folder}' cannot be reached: {error.strerror}."]


def _folder_problems(folder: Path, replaceable: bool) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir: '{folder}' is a file."]
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and MARKER not in found:
        return [f"output_dir: '{folder}' holds {', '.join(found)}, but no run of hftl (no {MARKER}); choose another."]
    if found and not replaceable:
        return [
            f"output_dir: '{folder}' holds a run already ({', '.join(found)}). Choose another, say --resume auto to go "
            "on with it, or --overwrite."
        ]
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        return [f"output_dir: '{folder}' cannot be made: '{existing}' is a file."]
    if not os.access(existing, os.W_OK):
        return [f"output_dir: '{folder}' cannot be written: no write permission in '{existing}'."]
    return []


def finished_metrics(folder: Path) -> dict[str, float | None] | None:
    """Returns the metrics of the finished run in a folder, or None where there is no run or it is not finished."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if report.get("complete") else None
    except (OSError, ValueError):
        return None


def resumes(run: RunConfig) -> bool:
    """Whether a run goes on from a checkpoint rather than begins."""
    return run.resume == "auto" and any((run_folder(run) / "checkpoints").glob("step-*"))


def resume_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder holds a run with other settings, as far as they change its results."""
    marker = run_folder(run) / MARKER
    if run.resume != "auto" or not marker.is_file():
        return []
    try:
        before = leaves(load(marker))
    except HftlError as error:
        return [f"resume: {marker} cannot be read: {first_line(error)} Choose another output_dir, or say --overwrite."]
    now = leaves(run)
    changed = [
        f"{name} was {before[name]}, now {value}"
        for name, value in now.items()
        if redacted(str(value)) != str(before[name]) and not name.startswith(MAY_CHANGE)
    ]
    if not changed:
        return []
    return [
        f"resume: '{run_folder(run)}' holds a run with other settings ({shorten(changed, 6)}). Give it the same ones, "
        "or choose another output_dir."
    ]


def make_folder(folder: Path, run: RunConfig) -> None:
    """Makes the run folder; removes the files of a run there that is replaced or never came to a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if resumes(run):
        clear_partial(folder)
        return
    if not (run.overwrite or run.resume == "auto"):
        return
    # the marker stays, to be replaced: without it, a folder half cleared by a process that was killed would be nobody's
    kept = (name for name in RUN_FILES if name != MARKER)
    for name in ("report.json", *kept, "predictions.parquet", "environment.json", "tensorboard"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    clear_partial(folder)
