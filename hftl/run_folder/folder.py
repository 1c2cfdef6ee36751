"""Run folder: checks before writing, locking, and the conditions for resuming."""

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
"""File with the repositories that the model was pushed to, and their commits; it is not pushed."""

RUN_FILES = ("config.yaml", QUARANTINE, "history.jsonl", "metrics.json", "model", "adapter", "checkpoints")
"""Files and folders of a run; `--overwrite` removes them."""
MARKER = "config.yaml"
"""Written first; only a folder with this file is ever cleared."""
MAY_CHANGE = (
    "checkpoint.", "data.max_skipped_fraction", "data.num_workers", "data.worker_timeout", "output_dir", "overwrite",
    "hub.", "resume", "train.batch_size_per_device", "train.gradient_accumulation_steps", "train.logging_steps",
    "train.max_nonfinite_steps", "train.num_threads", "train.on_", "train.timeout_minutes", "train.trackers",
)  # fmt: skip
"""Settings that may differ in a resumed run; the rows of a step do not depend on its batch size."""
MAY_BECOME = {"data.on_error": "skip"}
"""Settings that may change to this value in a resumed run."""


def get_run_folder(run: RunConfig) -> Path:
    """Returns the run folder."""
    return Path(run.output_dir or default_folder(run))


def folder_problems(run: RunConfig) -> list[str]:
    """Returns an error message if the run folder cannot be written or holds a run that must not be replaced."""
    folder = get_run_folder(run)
    if run.overwrite and run.resume == "auto":
        return ["resume: 'auto' conflicts with overwrite, which removes the run. Set only one."]
    inputs = {"model.name": run.model.name.removeprefix("local-dir:"), "data.source": run.data.source}
    try:
        problems = _folder_problems(folder, replaceable=run.overwrite or run.resume == "auto")
        for name, value in inputs.items() if not problems else ():
            path = Path(value).resolve()
            if value and path.exists() and folder.resolve() in (path, *path.parents):
                return [f"output_dir: '{folder}' contains {name} ('{value}'). Set another folder."]
        return problems
    except OSError as error:
        return [f"output_dir: '{folder}' cannot be accessed: {error.strerror}."]


def _folder_problems(folder: Path, replaceable: bool) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir: '{folder}' is a file. Set a folder."]
    existing = [name for name in RUN_FILES if (folder / name).exists()]
    if existing and MARKER not in existing:
        return [f"output_dir: '{folder}' contains {', '.join(existing)} but no {MARKER} of hftl. Set another folder."]
    if existing and not replaceable:
        return [
            f"output_dir: '{folder}' already contains a run ({', '.join(existing)}). Set another folder, "
            "--resume auto or --overwrite."
        ]
    parent = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not parent.is_dir():
        return [f"output_dir: '{folder}' cannot be created: '{parent}' is a file."]
    if not os.access(parent, os.W_OK):
        return [f"output_dir: '{folder}' cannot be written: no write permission in '{parent}'."]
    return []


def hold(folder: Path) -> None:
    """Locks the run folder for the lifetime of this process.

    Without the lock, a job restarted while the previous one saves a checkpoint would delete its files. The lock is an
    flock on the folder itself, which the system releases at any end of the process.

    Raises:
        ConfigError: Another process holds the lock.
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
            f"output_dir: another process is training in '{folder}'. Wait until it ends, or set another folder."
        ) from None
    except OSError:  # file system without locks
        pass
    _held[folder.resolve()] = descriptor


def finished_metrics(run: RunConfig) -> dict[str, float | None] | None:
    """Returns the metrics of the finished run in the run folder; None if it is unfinished or not yet pushed."""
    folder, repo = get_run_folder(run), run.hub.repo_id
    try:
        if repo and repo not in json.loads((folder / PUSHED).read_text(encoding="utf-8")):
            return None
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if report.get("complete") else None
    except (OSError, ValueError):
        return None


def resumes(run: RunConfig) -> bool:
    """Whether the run resumes from a checkpoint."""
    return (
        run.resume == "auto"
        and not run.restarts
        and any((get_run_folder(run) / "checkpoints").glob(f"step-*[0-9]/{MANIFEST}"))
    )


def resume_problems(run: RunConfig) -> list[str]:
    """Returns an error message if the run folder holds a run whose settings give other results."""
    marker = get_run_folder(run) / MARKER
    if run.resume != "auto" or not marker.is_file():
        return []
    try:
        before = leaves(load_saved_config(marker))
    except HftlError as error:
        return [f"resume: '{marker}' cannot be read: {first_line(error)} Set another output_dir or --overwrite."]
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
        f"resume: '{get_run_folder(run)}' contains a run with other settings ({shorten(changed, 6)}). "
        "Set the same values or another output_dir."
    ]


def make_folder(folder: Path, run: RunConfig) -> None:
    """Creates the run folder; removes the files of a replaced run or of one without a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    hold(folder)
    if resumes(run):
        clear_partial(folder)
        return
    if not (run.overwrite or run.resume == "auto"):
        return
    # MARKER is replaced later: without it, a partially cleared folder would not be recognized as a run
    run_files = (name for name in RUN_FILES if name != MARKER)
    other_files = (
        "report.json",
        "predictions.parquet",
        "environment.json",
        "compare.json",
        "heads.json",
        PUSHED,
        "tensorboard",
    )
    for name in (*run_files, *other_files):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    clear_partial(folder)
