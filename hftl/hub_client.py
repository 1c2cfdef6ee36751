"""Talking to the Hugging Face hub: with finite timeouts, rights known beforehand, and failures said in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftl import redaction as shown
from hftl.errors import first_line

CONNECT_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 300.0
"""Longest silence of the hub. Generous: a commit of many files takes it minutes."""
_XET_TIMEOUT = "HF_XET_CLIENT_READ_TIMEOUT"
LOGIN = "run `hf auth login` or set HF_TOKEN"


@contextmanager
def bounded() -> Iterator[None]:
    """Gives requests inside a timeout; huggingface_hub's own client waits for ever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY  # the user's own, perhaps; there is no public way to ask for it

    def factory() -> Any:
        client = before()
        client.timeout = type(client.timeout)(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return client

    given = os.environ.get(_XET_TIMEOUT)
    if given is None:  # the Xet client reads it when it starts
        os.environ[_XET_TIMEOUT] = f"{READ_TIMEOUT_S:.0f}s"
    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)
        if given is None:
            os.environ.pop(_XET_TIMEOUT, None)


def name_problem(repo: str) -> str | None:
    """Returns what is wrong with the name of a repository to push to, without asking anyone; None if nothing."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return f"'{repo}' is not a repository name: {first_line(error)}"
    return None if "/" in repo else f"'{repo}' names no owner; say user/{repo} or organisation/{repo}."


def repository_problem(repo: str, private: bool) -> str | None:
    """Makes sure that `repo` exists, may be written and is as private as asked; returns what is wrong.

    A repository that does not exist is created: whether a token may create one is known by doing it alone.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with bounded():
            user = api.whoami()["name"]
            api.create_repo(repo, private=private or None, exist_ok=True)
            # create_repo is content with a repository that exists, whoever may write to it
            api.auth_check(repo, write=True)
            public = not api.model_info(repo).private
    except Exception as error:
        return explain(error, repo)
    if private and public:
        return (
            f"{repo} is public, and a private one was asked for. Make it private in its settings on the hub, "
            f"or name another (you are '{user}')."
        )
    return None


def cached_commit(repo: str, revision: str | None) -> str | None:
    """Returns the commit of `repo` in the cache that `revision` names, by its config.json; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def explain(error: BaseException, repo: str) -> str:
    """Returns one sentence: why talking to the hub about `repo` failed, and what to do.

    The causes behind an error are looked at too, since the upload wraps them. No token is ever repeated.
    """
    causes = list(_chain(error))
    tried = (explained(cause, repo) for explained in (_local, _answered, _connection) for cause in causes)
    return redact_tokens(next(filter(None, tried), f"{type(error).__name__}: {first_line(error)}"))


def redact_tokens(text: str) -> str:
    """Returns `text` without anything that is, or looks like, a token."""
    from huggingface_hub import get_token

    token = get_token()
    return shown.redact(text.replace(token, "hf_***") if token else text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _local(error: BaseException, repo: str) -> str | None:
    """Explains what was refused on this machine, before any request."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"there is no token for the hub: {LOGIN}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE): unset it."
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is not a repository name: {first_line(error)}"
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return f"the hub refuses the model card: {first_line(error)}"
    return None


def _answered(error: BaseException, repo: str) -> str | None:
    """Explains an answer of the hub by its status."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", 0)
    said = error.server_message or first_line(error)
    if status == 401 and re.search("Invalid (credentials|user token)", f"{said} {error}"):
        return f"the hub does not accept the token (expired, revoked or mistyped): {LOGIN} anew."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access on its page."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision."
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} lacks a file: {first_line(error)}"
    if status == 401:
        return f"not logged in, or {repo} does not exist: {LOGIN}."
    if status in (402, 403) and re.search("storage|quota|limit", said, re.IGNORECASE):
        return f"the storage of the owner of {repo} is full: {said}"
    if status in (402, 403):
        return f"this token may not write to {repo}: use one with write access, or another name ({said})."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo} that this token can see; check the name."
    if status == 412:
        return f"{repo} received another commit in the meantime: push again."
    if status == 429:
        return f"the hub limits the rate of requests; wait and push again ({said})."
    if status >= 500:
        return f"the hub has trouble of its own (status {status}): push again later."
    return f"the hub refuses ({status}): {said}"


def _connection(error: BaseException, repo: str) -> str | None:
    """Explains a connection that failed. The HTTP library changed its name between versions of huggingface_hub."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] in ("httpx", "httpx2")]
    if not kinds and not isinstance(error, (ConnectionError, TimeoutError)):
        return None
    # the Xet client knows statuses only as text
    status = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    if status and status[1] in ("401", "403"):
        return f"the hub refuses the weights ({status[1]}): the token is no longer valid, or may not write to {repo}."
    if "TimeoutException" in kinds or "timed out" in str(error).lower():
        return f"the hub does not answer: nothing within {READ_TIMEOUT_S:.0f} s."
    from huggingface_hub import constants

    return f"the connection to {constants.ENDPOINT} failed: {first_line(error)}"
