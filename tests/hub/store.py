"""In-memory storage of the Hub server: users with permissions, repositories, commits, files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

import yaml

# suffixes in .gitattributes of new repositories on the public Hub; other files above the limit are LFS too
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".npy", ".parquet", ".pkl", ".zip")
LARGEST_REGULAR = 10 * 2**20
UNKNOWN_USER = "Invalid username or password."


class HubError(Exception):
    """Error response; the client selects its error class by `code` (header X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(status, message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass(frozen=True)
class User:
    """Owner of a token, with permissions.

    Attributes:
        name: Namespace of the user.
        role: "write", or "read" for a read-only token.
        orgs: Organizations in which the user can write.
        read_orgs: Organizations whose private repositories the user can only read.
    """

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    read_orgs: tuple[str, ...] = ()

    def reads(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs, *self.read_orgs)

    def writes(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.orgs)


@dataclass(frozen=True)
class File:
    """File of a commit; its `etag` is the git SHA-1, or the SHA-256 of an LFS or Xet file."""

    content: bytes = field(repr=False)
    lfs: bool = False
    xet_hash: str | None = None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        stored = self.content
        if self.lfs:  # git stores a pointer file
            lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(stored)}", ""
            stored = "\n".join(lines).encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, File]
    parent: str | None
    title: str
    author: str
    date: str


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR


class Repo:
    """Model repository with branches and commits; a commit contains all files.

    Attributes:
        id: "namespace/name", or "name" of legacy models of the public Hub.
        gated: Whether only readers of the namespace and `admitted` users can download files.
    """

    def __init__(self, repo_id: str, private: bool = False, gated: bool = False, author: str = "hub"):
        self.id, self.private, self.gated = repo_id, private, gated
        self.admitted: set[str] = set()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit({".gitattributes": File(attributes.encode())}, "initial commit", author)

    @property
    def namespace(self) -> str:
        return self.id.rpartition("/")[0]

    @property
    def files(self) -> dict[str, bytes]:
        """Contents of the files on main by path, without .gitattributes."""
        files = self.commits[self.branches["main"]].files
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    @property
    def titles(self) -> list[str]:
        """Titles of the commits on main, newest first."""
        titles, at = [], self.branches.get("main")
        while at:
            titles.append(self.commits[at].title)
            at = self.commits[at].parent
        return titles

    def commit(self, files: Mapping[str, File], title: str, author: str, branch: str = "main") -> str:
        # random: equal commits of two tests must not share entries of the client's cache
        oid = os.urandom(20).hex()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(dict(files), self.branches.get(branch), title, author, date)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """Returns the commit hash of a branch name or commit hash."""
        if oid := self.branches.get(revision):
            return oid
        if revision in self.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def size(self) -> int:
        """Returns the bytes of distinct LFS contents in all commits."""
        contents = {f.sha256: len(f.content) for c in self.commits.values() for f in c.files.values() if f.lfs}
        return sum(contents.values())


class Store:
    """Repositories by id, and uploaded content by SHA-256.

    Attributes:
        private_limit: Storage limit of the private repositories of a namespace, in bytes; None for no limit.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        self.private_limit: int | None = None

    def readable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository that `user` can see; for others a private repository does not exist."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.reads(repo.namespace))):
            if user is None:
                raise HubError(401, UNKNOWN_USER, "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def fetchable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository whose files `user` can download."""
        repo = self.readable(repo_id, user)
        if repo.gated and not (user and (user.reads(repo.namespace) or user.name in repo.admitted)):
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    def writable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository to which `user` can write."""
        repo = self.readable(repo_id, user)
        if user is None:
            raise HubError(401, UNKNOWN_USER, "RepoNotFound")
        if not user.writes(repo.namespace):
            message = "you must use a write token" if user.role == "read" else "you don't have the required permissions"
            raise HubError(403, f"Forbidden: {message} to change {repo_id}")
        return repo

    def check_storage_limit(self, repo: Repo, more: int) -> None:
        """Raises HubError if `more` bytes exceed the limit of private storage."""
        if not repo.private or self.private_limit is None:
            return
        private = [each for each in self.repos.values() if each.private and each.namespace == repo.namespace]
        if sum(each.size() for each in private) + more > self.private_limit:
            plan = "please upgrade your plan to increase your private storage limit"
            raise HubError(403, f"Private repository storage limit reached, {plan}.")


def card_metadata(readme: bytes) -> dict:
    """Returns the YAML metadata of a model card, validated like on the public Hub.

    Raises:
        ValueError: The metadata are not a YAML mapping, or an entry of model-index lacks a key.
    """
    block = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", readme.decode(errors="replace"), re.DOTALL | re.MULTILINE)
    try:
        metadata = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError("the metadata must be a mapping")
    for number, model in enumerate(metadata.get("model-index") or []):
        for path, mapping, keys in result_sections(f"model-index[{number}]", model):
            if missing := [key for key in keys if mapping.get(key) is None]:
                raise ValueError(f'"{path}.{missing[0]}" is required')
    return metadata


def result_sections(path: str, model: dict) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    """Yields (path, mapping, required keys) of each section of an entry of model-index."""
    yield path, model, ("name", "results")
    for number, result in enumerate(model["results"]):
        result_path = f"{path}.results[{number}]"
        yield result_path, result, ("task", "dataset", "metrics")
        yield f"{result_path}.task", result["task"], ("type",)
        yield f"{result_path}.dataset", result["dataset"], ("type", "name")
        for position, metric in enumerate(result["metrics"]):
            yield f"{result_path}.metrics[{position}]", metric, ("type", "value")
