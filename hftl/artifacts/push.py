"""To the hub: what was verified goes up in one piece, and what arrived is loaded back by its id and compared."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.model_card import write_card
from hftl.artifacts.save_model import adapter_reader, compare_logits, fresh_base, load_model_and_task, read_sample
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

BESIDE = ("metrics.json", "report.json")
"""Files of the run folder that go along. What holds rows stays: predictions, the comparison sample, errors shown."""


def push(folder: str | Path, repo: str, private: bool = False, verify: bool = True) -> str:
    """Uploads a finished run to the hub, as one commit; doing it again is safe and changes nothing.

    The stock model with its card stands at the top of the repository, an adapter in `adapter/`.

    Args:
        folder: The run folder.
        repo: `user/name`; created where it does not exist.
        private: Create it private; refuse one that is public.
        verify: Load the pushed revision back by id, with the libraries that users will use, and compare logits.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: The folder does not hold a finished run, or what came back computes something else.
        PushError: The hub could not be reached or refused; says why, and the command that tries again.
    """
    record = RunRecord(folder)
    if not record.parts:
        raise ArtifactError(
            f"'{folder}' holds no verified model: there is no model/{DESCRIPTION}, which is written last."
        )
    problem = name_problem(repo) or repository_problem(repo, private)
    if problem:
        raise PushError(_failed(problem, record, repo, private))
    with tempfile.TemporaryDirectory() as staged, bounded():
        try:
            _stage(record, repo, Path(staged))
            commit = _upload(record, repo, staged)
        except Exception as error:  # whatever the libraries raise, the run is on disk and the reader needs one sentence
            raise PushError(_failed(explain(error, repo), record, repo, private)) from error
        log(f"push: {record.folder} is {commit.commit_url}")
        if verify:
            _load_back(record, repo, commit.oid, private)
    _note(record.folder / PUSHED, repo, commit.commit_url)
    return commit.commit_url


def _note(file: Path, repo: str, commit: str) -> None:
    """Adds a repository to those that the model has arrived in."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_text(file, json.dumps({**before, repo: commit}, indent=2))


def push_once(accelerator: Accelerator, folder: Path, config: HubConfig) -> None:
    """Pushes from the main process. The others wait as long as it is alive, and fail when it fails.

    Raises:
        PushError: On all processes alike.
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
        kind, problems = failure[0]
        raise kind(*problems)


def _stage(record: RunRecord, repo: str, into: Path) -> None:
    """Lays out the repository in a folder of links; only the cards are written anew, with the repository's name."""
    for part in record.parts:
        target = into if part == "model" else into / part
        for file in sorted((record.folder / part).rglob("*")):
            if file.is_file() and file.name != "README.md":
                link = target / file.relative_to(record.folder / part)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
        write_card(record, part, target, repo)
    for name in BESIDE:
        (into / name).symlink_to((record.folder / name).resolve())
    write_report(record.folder, into / REPORT, show_rows=False)


def _upload(record: RunRecord, repo: str, staged: str) -> Any:
    from huggingface_hub import HfApi

    # an adapter of an earlier run must not stand beside a model that it does not belong to
    stale = None if "adapter" in record.parts else ["adapter/*"]
    title = f"{record.described['method']} on {Path(record.settings['data.source']).name}, by hftl"
    return HfApi().upload_folder(repo_id=repo, folder_path=staged, commit_message=title, delete_patterns=stale)


def _load_back(record: RunRecord, repo: str, revision: str, private: bool) -> None:
    """Opens the pushed revision by its id and compares its logits with those of the trained model."""
    inputs, expected = read_sample(record.folder)
    model, _ = load_model_and_task(record.folder)
    try:
        compare_logits(lambda: model.loaders(repo, revision), inputs, expected, f"{repo}@{revision[:8]}", "model")
        if "adapter" in record.parts:
            base, options = fresh_base(record.folder / "adapter"), {"subfolder": "adapter", "revision": revision}
            opened = lambda: adapter_reader(model, base, repo, **options)  # noqa: E731
            compare_logits(opened, inputs, expected, f"{repo}@{revision[:8]}/adapter", "adapter")
    except ArtifactError as error:
        cause = error.__cause__
        reason = f"the upload is complete, but it does not load back: {explain(cause, repo) if cause else error}"
        raise PushError(_failed(reason, record, repo, private)) from error


def _failed(reason: str, record: RunRecord, repo: str, private: bool) -> str:
    command = shlex.join(["hftl", "push", str(record.folder), repo, *(["--private"] if private else [])])
    return f"push to {repo}: {reason} The run is complete in {record.folder}. To push again:\n  {command}"
