"""Hugging Face Hub client: finite timeouts, access checks before training, and one error message per failure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftl.errors import first_line
from hftl.redaction import redact

CONNECT_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 300.0
"""Maximum seconds without a response. Generous, since a commit of many files takes the Hub minutes."""
_XET_TIMEOUT = "HF_XET_CLIENT_READ_TIMEOUT"
LOGIN = "run `hf auth login` or set HF_TOKEN"


@contextmanager
def bounded() -> Iterator[None]:
    """Sets a timeout for requests in the block; the client of huggingface_hub waits forever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY  # may be set by the user; huggingface_hub has no public getter

    def factory() -> Any:
        client = before()
        client.timeout = type(client.timeout)(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return client

    xet_timeout = os.environ.get(_XET_TIMEOUT)
    if xet_timeout is None:  # the Xet client reads it at startup
        os.environ[_XET_TIMEOUT] = f"{READ_TIMEOUT_S:.0f}s"
    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)
        if xet_timeout is None:
            os.environ.pop(_XET_TIMEOUT, None)


def name_problem(repo: str) -> str | None:
    """Returns why `repo` is not a valid repo id to push to, without a request; None if it is valid."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return f"'{repo}' is not a valid repo id: {first_line(error)}"
    return None if "/" in repo else f"'{repo}' has no owner. Set 'USER/{repo}' or 'ORGANIZATION/{repo}'."


def repository_problem(repo: str, private: bool) -> str | None:
    """Returns why the model cannot be pushed to `repo` with this visibility; None if it can.

    A missing repository is created, since no request tells in advance whether the token may create it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with bounded():
            user = api.whoami()["name"]
            api.create_repo(repo, private=private or None, exist_ok=True)
            # create_repo succeeds for an existing repository without write access
            api.auth_check(repo, write=True)
            public = not api.model_info(repo).private
    except Exception as error:
        return explain(error, repo)
    if private and public:
        return (
            f"'{repo}' is public, but hub.private is true. Make it private in its settings on the Hub, or set another "
            f"repo id (user '{user}')."
        )
    return None


def cached_commit(repo: str, revision: str | None) -> str | None:
    """Returns the commit of `revision` of `repo` in the local cache, by its config.json; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def explain(error: BaseException, repo: str) -> str:
    """Returns one message: why a request about `repo` failed, and what to do.

    The causes of the error are checked too, since uploads wrap them. Tokens are redacted.
    """
    causes = list(_chain(error))
    messages = (describe(cause, repo) for describe in (_local, _response, _connection) for cause in causes)
    return redact_tokens(next(filter(None, messages), f"{type(error).__name__}: {first_line(error)}"))


def redact_tokens(text: str) -> str:
    """Returns `text` with the token of the user and everything that looks like a token redacted."""
    from huggingface_hub import get_token

    token = get_token()
    return redact(text.replace(token, "hf_***") if token else text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _local(error: BaseException, repo: str) -> str | None:
    """Describes an error that was raised before any request."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no Hub token is set: {LOGIN}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is enabled by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE. Unset the variable."
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is not a valid repo id: {first_line(error)}"
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return f"the Hub rejects the model card: {first_line(error)}"
    return None


def _response(error: BaseException, repo: str) -> str | None:
    """Describes an error response of the Hub."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", 0)
    message = error.server_message or first_line(error)
    if status == 401 and re.search("Invalid (credentials|user token)", f"{message} {error}"):
        return f"the Hub does not accept the token (expired, revoked or mistyped): {LOGIN} again."
    if isinstance(error, errors.GatedRepoError):
        return f"'{repo}' is gated. Request access on its page."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{repo}' has no such revision."
    if isinstance(error, errors.EntryNotFoundError):
        return f"'{repo}' lacks a file: {first_line(error)}"
    if status == 401:
        return f"not logged in, or '{repo}' does not exist: {LOGIN}."
    if status in (402, 403) and re.search("storage|quota|limit", message, re.IGNORECASE):
        return f"the storage of the owner of '{repo}' is full: {message}"
    if status in (402, 403):
        return f"this token has no write access to '{repo}' ({message}). Set another token or repo id."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"'{repo}' does not exist or is not accessible with this token. Check the repo id."
    if status == 412:
        return f"'{repo}' received another commit in the meantime. Push again."
    if status == 429:
        return f"the rate limit of the Hub is exceeded ({message}). Wait and push again."
    if status >= 500:
        return f"the Hub returned server error {status}. Push again later."
    return f"the Hub returned error {status}: {message}"


def _connection(error: BaseException, repo: str) -> str | None:
    """Describes a failed connection. The HTTP library differs between versions of huggingface_hub."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] in ("httpx", "httpx2")]
    if not kinds and not isinstance(error, (ConnectionError, TimeoutError)):
        return None
    # the Xet client reports the status only as text
    status = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    if status and status[1] in ("401", "403"):
        return f"the Hub rejects the weights ({status[1]}): the token is invalid or has no write access to '{repo}'."
    if "TimeoutException" in kinds or "timed out" in str(error).lower():
        return f"no response from the Hub within {READ_TIMEOUT_S:.0f} s."
    from huggingface_hub import constants

    return f"the connection to {constants.ENDPOINT} failed: {first_line(error)}"
