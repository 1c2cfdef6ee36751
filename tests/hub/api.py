"""Routes of the Hub API: account, repositories, upload, download."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING
from urllib.parse import quote

from .message import Request, Response
from .store import UNKNOWN_USER, File, HubError, Repo, User, card_metadata, is_lfs

if TYPE_CHECKING:
    from .server import Hub


# Account


def whoami(hub: Hub, request: Request) -> Response:
    user = require_user(request)
    token = {"displayName": "test", "role": user.role}
    roles = {**dict.fromkeys(user.orgs, "write"), **dict.fromkeys(user.read_orgs, "read")}
    return Response(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name.title(),
            "isPro": False,
            "orgs": [{"type": "org", "name": org, "roleInOrg": role} for org, role in roles.items()],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def require_user(request: Request) -> User:
    if request.user is None:
        raise HubError(401, UNKNOWN_USER)
    return request.user


def empty_response(hub: Hub, request: Request) -> Response:
    return Response()


# Repositories


def create_repo(hub: Hub, request: Request) -> Response:
    user, requested = require_user(request), request.json
    namespace = requested.get("organization") or user.name
    repo_id = f"{namespace}/{requested['name']}"
    if not user.writes(namespace):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = {"url": f"{hub.url}/{repo_id}"}
    if repo_id in hub.store.repos:
        return Response({"error": "You already created this model repo", **url}, 409)
    # huggingface_hub below 1.0 sends `private`
    private = requested.get("visibility") == "private" or requested.get("private", False)
    hub.store.repos[repo_id] = Repo(repo_id, private=private, author=user.name)
    return Response(url)


def repo_info(hub: Hub, request: Request, repo_id: str, revision: str | None = None) -> Response:
    repo = hub.store.readable(repo_id, request.user)
    oid = repo.resolve(revision or "main")
    files = repo.commits[oid].files
    card = card_metadata(files["README.md"].content) if "README.md" in files else {}
    blobs = request.query.get("blobs")
    return Response(
        {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo.namespace,
            "sha": oid,
            "lastModified": repo.commits[oid].date,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "model-index": card.get("model-index"),
            "siblings": [{"rfilename": path, **(file_info(file) if blobs else {})} for path, file in files.items()],
        }
    )


def file_info(file: File) -> dict:
    """Returns the fields of a file in listings."""
    info: dict = {"oid": file.git_oid, "blobId": file.git_oid, "size": len(file.content)}
    if file.lfs:
        info["lfs"] = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
    if file.xet_hash:
        info["xetHash"] = file.xet_hash
    return info


def tree(hub: Hub, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Response:
    repo = hub.store.readable(repo_id, request.user)
    oid = repo.resolve(revision)
    start = f"{folder.strip('/')}/" if folder else ""
    entries = {}
    for path, file in repo.commits[oid].files.items():
        if not path.startswith(start):
            continue
        *parents, _ = path.removeprefix(start).split("/")
        if parents and request.query.get("recursive", "").lower() != "true":
            directory = start + parents[0]
            directory_oid = hashlib.sha1(directory.encode()).hexdigest()
            entries[directory] = {"type": "directory", "path": directory, "oid": directory_oid, "size": 0}
        else:
            entries[path] = {"type": "file", "path": path, **file_info(file)}
    if start and not entries:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return Response([entries[path] for path in sorted(entries)])


def create_branch(hub: Hub, request: Request, repo_id: str, branch: str) -> Response:
    repo = hub.store.writable(repo_id, request.user)
    if branch in repo.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.resolve(request.json.get("startingPoint") or "main")
    return Response()


def auth_check(hub: Hub, request: Request, repo_id: str, write: str | None = None) -> Response:
    (hub.store.writable if write else hub.store.fetchable)(repo_id, request.user)
    return Response()


# Upload


def validate_yaml(hub: Hub, request: Request) -> Response:
    try:
        card_metadata(request.json["content"].encode())
    except ValueError as error:
        return Response({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Response({"errors": [], "warnings": []})


def preupload(hub: Hub, request: Request, repo_id: str, revision: str) -> Response:
    repo = hub.store.writable(repo_id, request.user)
    present = repo.commits[repo.resolve(revision)].files
    modes = []
    for file in request.json["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        known = {"oid": present[path].etag} if path in present else {}  # the client skips unchanged files
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Response({"files": modes})


def lfs_batch(hub: Hub, request: Request, repo_id: str) -> Response:
    repo = hub.store.writable(repo_id, request.user)
    objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in request.json["objects"]]
    hub.store.check_storage_limit(repo, sum(entry["size"] for entry in objects))
    for entry in objects:
        if entry["oid"] not in hub.store.uploaded:
            href = f"{hub.url}/lfs/{repo_id}/{entry['oid']}"
            entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
    return Response({"transfer": "basic", "objects": objects})


def lfs_put(hub: Hub, request: Request, repo_id: str, oid: str) -> Response:
    # no permission check: the public Hub uses signed URLs without a token
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"the content does not have the SHA-256 {oid}")
    hub.store.uploaded[oid] = request.body
    return Response(b"")


def lfs_verify(hub: Hub, request: Request, repo_id: str, oid: str) -> Response:
    hub.store.writable(repo_id, request.user)
    if len(hub.store.uploaded.get(oid, b"")) != request.json["size"]:
        raise HubError(404, f"LFS object {oid} is not here")
    return Response()


def commit(hub: Hub, request: Request, repo_id: str, branch: str) -> Response:
    repo, user = hub.store.writable(repo_id, request.user), require_user(request)
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    header, *changes = [json.loads(line) for line in request.body.splitlines()]
    parent = header["value"].get("parentCommit")
    if parent and parent != repo.branches[branch]:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[repo.branches[branch]].files)
    for change in changes:
        apply(change["key"], change["value"], files, hub)
    new = {file.sha256: len(file.content) for file in files.values() if file.lfs}
    stored = {file.sha256 for old in repo.commits.values() for file in old.files.values()}
    hub.store.check_storage_limit(repo, sum(size for sha256, size in new.items() if sha256 not in stored))
    try:
        card_metadata(files["README.md"].content if "README.md" in files else b"")
    except ValueError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from None
    oid = repo.commit(files, header["value"]["summary"], user.name, branch)
    return Response({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"})


def apply(kind: str, change: dict, files: dict[str, File], hub: Hub) -> None:
    """Applies one line of a commit to `files`."""
    path = change["path"]
    if kind == "file":
        files[path] = File(base64.b64decode(change["content"]))
    elif kind == "lfsFile":
        sha256 = change["oid"]
        if sha256 not in hub.store.uploaded:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(hub.store.uploaded[sha256], lfs=True, xet_hash=hub.xet.hashes.get(sha256))
    elif kind == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif kind == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise HubError(400, f"unknown line of a commit: {kind}")


# Download


def download(hub: Hub, request: Request, repo_id: str, revision: str, path: str) -> Response:
    repo = hub.store.fetchable(repo_id, request.user)
    oid = repo.resolve(revision)
    file = repo.commits[oid].files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    if file.xet_hash:
        route = f"{hub.url}/api/models/{quote(repo_id)}/xet-read-token/{oid}"
        headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
    return Response.content(request, file.content, headers)


REPO_ID = r"([\w.-]+(?:/[\w.-]+)?)"
MODEL = f"/api/models/{REPO_ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/agent-harnesses", empty_response),
    ("HEAD", "/api/telemetry/.*", empty_response),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("GET", f"{MODEL}/revision/([^/]+)", repo_info),
    ("GET", f"{MODEL}/tree/([^/]+)(/.+)?", tree),
    ("GET", f"{MODEL}/auth-check(/write)?", auth_check),
    ("POST", f"{MODEL}/branch/([^/]+)", create_branch),
    ("POST", f"{MODEL}/preupload/([^/]+)", preupload),
    ("POST", f"{MODEL}/commit/([^/]+)", commit),
    ("GET", MODEL, repo_info),
    ("POST", rf"/{REPO_ID}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", f"/lfs/{REPO_ID}/([0-9a-f]{{64}})", lfs_put),
    ("POST", f"/lfs/{REPO_ID}/([0-9a-f]{{64}})/verify", lfs_verify),
    ("GET HEAD", f"/{REPO_ID}/resolve/([^/]+)/(.+)", download),
]
