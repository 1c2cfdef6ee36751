"""What the hub keeps, in memory: users with their rights, repositories, commits, files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

import yaml

# What the public hub's .gitattributes of a new repository names; longer files of other kinds are LFS too.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".npy", ".parquet", ".pkl", ".zip")
LARGEST_REGULAR = 10 * 2**20
UNKNOWN_USER = "Invalid username or password."


class Refusal(Exception):
    """An answer other than success; `code` is the X-Error-Code that makes the client raise its own error class."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(status, message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass(frozen=True)
class User:
    """Whom a token stands for, and what it allows.

    Attributes:
        name: the user's own namespace.
        role: "write", or "read" for a token that changes nothing.
        orgs: organisations in which the user may write.
        visits: organisations whose private repositories the user may only read.
    """

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    visits: tuple[str, ...] = ()

    def reads(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs, *self.visits)

    def writes(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.orgs)


@dataclass(frozen=True)
class File:
    """One file of a commit; its `etag` is git's SHA-1, or the SHA-256 if it is sent by LFS or Xet."""

    content: bytes = field(repr=False)
    lfs: bool = False
    xet_hash: str | None = None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        stored = self.content
        if self.lfs:  # git keeps a pointer
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
    """A model repository: branches that name commits, each with all its files.

    Attributes:
        id: "namespace/name", or "name" alone as the oldest models of the public hub have it.
        gated: only readers of the namespace and `admitted` users may fetch files.
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
        """Contents of the files on main by path, without the .gitattributes that every repository starts with."""
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
        # Random, not a hash of the commit: equal commits of two tests must not meet in a client's cache.
        oid = os.urandom(20).hex()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(dict(files), self.branches.get(branch), title, author, date)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """Returns the commit that a branch name or a commit's hash names."""
        if oid := self.branches.get(revision):
            return oid
        if revision in self.commits:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def size(self) -> int:
        """Bytes of all the LFS content in all commits, each content counted once."""
        contents = {f.sha256: len(f.content) for c in self.commits.values() for f in c.files.values() if f.lfs}
        return sum(contents.values())


class Store:
    """Repositories by id, and content that was sent but is in no commit yet.

    Attributes:
        private_limit: bytes that the private repositories of one namespace may hold; None: no limit.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.sent: dict[str, bytes] = {}
        self.private_limit: int | None = None

    def readable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository that `user` may see; whether a private one exists is told to nobody else."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.reads(repo.namespace))):
            if user is None:
                raise Refusal(401, UNKNOWN_USER, "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def fetchable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository whose files `user` may fetch."""
        repo = self.readable(repo_id, user)
        if repo.gated and not (user and (user.reads(repo.namespace) or user.name in repo.admitted)):
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(403 if user else 401, message, "GatedRepo")
        return repo

    def writable(self, repo_id: str, user: User | None) -> Repo:
        """Returns a repository that `user` may change."""
        repo = self.readable(repo_id, user)
        if user is None:
            raise Refusal(401, UNKNOWN_USER, "RepoNotFound")
        if not user.writes(repo.namespace):
            message = "you must use a write token" if user.role == "read" else "you don't have the required permissions"
            raise Refusal(403, f"Forbidden: {message} to change {repo_id}")
        return repo

    def check_room(self, repo: Repo, more: int) -> None:
        """Refuses `more` bytes that would not fit the limit of private storage."""
        if not repo.private or self.private_limit is None:
            return
        held = sum(other.size() for other in self.repos.values() if other.private and other.namespace == repo.namespace)
        if held + more > self.private_limit:
            plan = "please upgrade your plan to increase your private storage limit"
            raise Refusal(403, f"Private repository storage limit reached, {plan}.")


def card_metadata(readme: bytes) -> dict:
    """Returns the YAML block at the head of a model card, checked as the public hub does where models meet it.

    Raises:
        ValueError: it is no YAML mapping, or an entry of its model-index lacks a part.
    """
    block = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", readme.decode(errors="replace"), re.DOTALL | re.MULTILINE)
    try:
        metadata = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError("the metadata must be a mapping")
    for number, model in enumerate(metadata.get("model-index") or []):
        for place, mapping, keys in parts_of_results(f"model-index[{number}]", model):
            if missing := [key for key in keys if mapping.get(key) is None]:
                raise ValueError(f'"{place}.{missing[0]}" is required')
    return metadata


def parts_of_results(place: str, model: dict) -> Iterator[tuple[str, dict, tuple[str, ...]]]:
    """Yields the parts of an entry of a model-index: where it stands, the part, the keys it must have."""
    yield place, model, ("name", "results")
    for number, result in enumerate(model["results"]):
        at = f"{place}.results[{number}]"
        yield at, result, ("task", "dataset", "metrics")
        yield f"{at}.task", result["task"], ("type",)
        yield f"{at}.dataset", result["dataset"], ("type", "name")
        for position, metric in enumerate(result["metrics"]):
            yield f"{at}.metrics[{position}]", metric, ("type", "value")
