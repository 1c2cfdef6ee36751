"""The run folder: what may be written there, what is there already, and whether a run there can go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hftl.atomic_files import sync
from hftl.config.defaults import default_folder
from hftl.config.parse import load_saved_config
from hftl.config.schema import RunConfig, leaves
from hftl.data.validation import FILE as QUARANTINE
from hftl.errors import ConfigError, HftlError, first_line, shorten
from hftl.hub_client import redact_tokens
from hftl.run_folder.checkpoint import MANIFEST, VERSION, clear_partial, newest_version

_held: dict[Path, int] = {}
PUSHED = "pushed.json"
"""Repositories that the model has arrived in, with their commits; not part of what is pushed."""

RUN_FILES = ("config.yaml", QUARANTINE, "history.jsonl", "metrics.json", "model", "adapter", "checkpoints")
"""What a run leaves in its folder; `--overwrite` removes these."""
MARKER = "config.yaml"
"""Written first: only a folder that has it is ever cleared."""
MAY_CHANGE = (
    "checkpoint.", "data.max_skipped_fraction", "data.num_workers", "data.worker_timeout", "output_dir", "overwrite",
    "hub.", "resume", "train.batch_size_per_device", "train.gradient_accumulation_steps", "train.logging_steps",
    "train.max_nonfinite_steps", "train.num_threads", "train.on_", "train.timeout_minutes", "train.trackers",
)  # fmt: skip
"""Settings that may differ when a run goes on. The rows of a step stay as they were, whatever batches it is made of."""
MAY_BECOME = {"data.on_error": "skip"}
"""Settings that may have this value when a run resumes, whatever they were."""


def get_run_folder(run: RunConfig) -> Path:
    """Returns the run folder."""
    return Path(run.output_dir or default_folder(run))


def folder_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder cannot be written or holds a run that may not be replaced."""
    folder = get_run_folder(run)
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


def hold(folder: Path) -> None:
    """Keeps other processes out of the run folder for as long as this one lives.

    A job that was started again while the old one still saves its state would delete what that one writes. The lock is
    the system's (flock), on the folder itself: it ends with the process, however that ends.

    Raises:
        ConfigError: Another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    held = _held.get(folder.resolve())
    if held is not None and folder.stat().st_ino == os.fstat(held).st_ino:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"output_dir: another process trains in '{folder}'. Wait until it has ended, or choose another."
        ) from None
    except OSError:  # a file system without locks
        pass
    _held[folder.resolve()] = descriptor


def finished_metrics(run: RunConfig) -> dict[str, float | None] | None:
    """Returns the metrics of the finished run in the run folder, or None where it is not finished, or not pushed."""
    folder, repo = get_run_folder(run), run.hub.repo_id
    try:
        if repo and repo not in json.loads((folder / PUSHED).read_text(encoding="utf-8")):
            return None
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if report.get("complete") else None
    except (OSError, ValueError):
        return None


def resumes(run: RunConfig) -> bool:
    """Whether a run goes on from a checkpoint rather than begins."""
    return (
        run.resume == "auto"
        and not run.restarts
        and any((get_run_folder(run) / "checkpoints").glob(f"step-*[0-9]/{MANIFEST}"))
    )


def resume_problems(run: RunConfig) -> list[str]:
    """Returns a sentence when the run folder holds a run with other settings, as far as they change its results."""
    marker = get_run_folder(run) / MARKER
    if run.resume != "auto" or not marker.is_file():
        return []
    try:
        before = leaves(load_saved_config(marker))
    except HftlError as error:
        return [f"resume: {marker} cannot be read: {first_line(error)} Choose another output_dir, or say --overwrite."]
    version = newest_version(get_run_folder(run) / "checkpoints")
    if version not in (None, VERSION) and finished_metrics(run) is None:
        return [
            f"resume: '{get_run_folder(run)}' holds an unfinished run of another version of hftl (checkpoint format "
            f"{version}; allowed: {VERSION}). Finish it with that version, or set another output_dir."
        ]
    now = leaves(run)
    changed = [
        f"{name} was {before[name]}, now {value}"
        for name, value in now.items()
        if value != before[name]
        and redact_tokens(str(value)) != str(before[name])
        and not name.startswith(MAY_CHANGE)
        and MAY_BECOME.get(name) != value
    ]
    if not changed:
        return []
    return [
        f"resume: '{get_run_folder(run)}' holds a run with other settings ({shorten(changed, 6)}). "
        "Give it the same ones, or choose another output_dir."
    ]


def make_folder(folder: Path, run: RunConfig) -> None:
    """Makes the run folder; removes the files of a run there that is replaced or never came to a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    hold(folder)
    if resumes(run):
        clear_partial(folder)
        return
    if not (run.overwrite or run.resume == "auto"):
        return
    # the marker stays, to be replaced: without it, a folder half cleared by a process that was killed would be nobody's
    kept = (name for name in RUN_FILES if name != MARKER)
    beside = (
        "report.json",
        "predictions.parquet",
        "environment.json",
        "compare.json",
        "heads.json",
        PUSHED,
        "tensorboard",
    )
    for name in (*kept, *beside):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    clear_partial(folder)
