"""Push to the Hub: uploads a verified model in one commit, then loads it by repo id and compares the logits."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.model_card import write_card
from hftl.artifacts.save_model import build_base_network, compare_logits, load_adapter, load_model_and_task, read_sample
from hftl.atomic_files import write_text
from hftl.config.schema import HubConfig
from hftl.distributed import heartbeat_barrier
from hftl.errors import ArtifactError, PushError
from hftl.hub_client import bounded, explain, name_problem, repository_problem
from hftl.logging import log
from hftl.reporting import REPORT, write_report
from hftl.reporting.run_record import DESCRIPTION, RunRecord
from hftl.run_folder.folder import PUSHED

if TYPE_CHECKING:
    from accelerate import Accelerator

RUN_FILES = ("metrics.json", "report.json")
"""Uploaded files of the run folder. Files with rows of the data (predictions, sample, example rows) stay local."""


def push(folder: str | Path, repo: str, private: bool = False, verify: bool = True) -> str:
    """Uploads a finished run to the Hub in one commit; repeating the call is safe and changes nothing.

    The repository contains the model and its card at the top level, and the adapter in `adapter/`.

    Args:
        folder: The run folder.
        repo: Repo id `user/name`; created if it does not exist.
        private: Whether to create a private repository; an existing public one is an error.
        verify: Whether to load the pushed revision by repo id with timm, transformers or peft and compare logits.

    Returns:
        The URL of the commit.

    Raises:
        ArtifactError: The folder is not a finished run, or lacks the sample for the verification.
        PushError: The Hub is unreachable or rejects the upload, or the logits of the pushed model differ. The
            message contains the cause and the command for another attempt.
    """
    record = RunRecord(folder)
    if not record.parts:
        raise ArtifactError(
            f"'{folder}' does not contain a verified model: model/{DESCRIPTION} is missing. Resume the run."
        )
    problem = name_problem(repo) or repository_problem(repo, private)
    if problem:
        raise PushError(_failure_message(problem, record, repo, private))
    with tempfile.TemporaryDirectory() as staging_folder, bounded():
        try:
            _stage(record, repo, Path(staging_folder))
            commit = _upload(record, repo, staging_folder)
        except Exception as error:  # any library error becomes one message: the run itself is complete on disk
            raise PushError(_failure_message(explain(error, repo), record, repo, private)) from error
        log(f"push: uploaded {record.folder} to {commit.commit_url}")
        if verify:
            _verify_pushed(record, repo, commit.oid, private)
    _record_push(record.folder / PUSHED, repo, commit.commit_url)
    return commit.commit_url


def _record_push(file: Path, repo: str, commit: str) -> None:
    """Adds a repository and its commit URL to the list of completed pushes."""
    completed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_text(file, json.dumps({**completed, repo: commit}, indent=2))


def push_once(accelerator: Accelerator, folder: Path, config: HubConfig) -> None:
    """Pushes from the main process; the other processes wait at a barrier.

    Raises:
        ArtifactError: The folder is not a finished run; raised on all processes.
        PushError: The push failed; raised on all processes.
    """
    from accelerate.utils import broadcast_object_list

    failure: list[tuple[type[Exception], list[str]] | None] = [None]
    with heartbeat_barrier("push"):
        if accelerator.is_main_process:
            try:
                push(folder, str(config.repo_id), config.private, config.verify)
            except (ArtifactError, PushError) as error:
                failure = [(type(error), error.problems)]
    if accelerator.num_processes > 1:
        broadcast_object_list(failure, from_process=0)
    if failure[0]:
        error_class, problems = failure[0]
        raise error_class(*problems)


def _stage(record: RunRecord, repo: str, into: Path) -> None:
    """Creates the repository layout as symbolic links; cards are regenerated with the repo id."""
    for part in record.parts:
        target = into if part == "model" else into / part
        for file in sorted((record.folder / part).rglob("*")):
            if file.is_file() and file.name != "README.md":
                link = target / file.relative_to(record.folder / part)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
        write_card(record, part, target, repo)
    for name in RUN_FILES:
        (into / name).symlink_to((record.folder / name).resolve())
    write_report(record.folder, into / REPORT, show_rows=False)


def _upload(record: RunRecord, repo: str, staging_folder: str) -> Any:
    from huggingface_hub import HfApi

    # the adapter of an earlier run does not match the new model
    stale = None if "adapter" in record.parts else ["adapter/*"]
    title = f"{record.description['method']} on {Path(record.settings['data.source']).name}, by hftl"
    return HfApi().upload_folder(repo_id=repo, folder_path=staging_folder, commit_message=title, delete_patterns=stale)


def _verify_pushed(record: RunRecord, repo: str, revision: str, private: bool) -> None:
    """Loads the pushed revision by repo id and compares its logits with those of the trained model.

    Raises:
        PushError: The revision cannot be loaded, or its logits differ.
    """
    inputs, expected = read_sample(record.folder)
    model, _ = load_model_and_task(record.folder)
    try:
        compare_logits(lambda: model.loaders(repo, revision), inputs, expected, f"{repo}@{revision[:8]}", "model")
        if "adapter" in record.parts:
            base = build_base_network(record.folder / "adapter")
            options = {"subfolder": "adapter", "revision": revision}
            reload = lambda: load_adapter(model, base, repo, **options)  # noqa: E731
            compare_logits(reload, inputs, expected, f"{repo}@{revision[:8]}/adapter", "adapter")
    except ArtifactError as error:
        cause = error.__cause__
        reason = f"the upload is complete, but its verification failed: {explain(cause, repo) if cause else error}"
        raise PushError(_failure_message(reason, record, repo, private)) from error


def _failure_message(reason: str, record: RunRecord, repo: str, private: bool) -> str:
    command = shlex.join(["hftl", "push", str(record.folder), repo, *(["--private"] if private else [])])
    return f"push to {repo}: {reason} The run is complete in {record.folder}. To push again, run:\n  {command}"
