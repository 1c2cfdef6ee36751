"""The routes of the hub itself: account, repositories, upload, download."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING
from urllib.parse import quote

from .message import Answer, Request
from .store import UNKNOWN_USER, File, Refusal, Repo, User, card_metadata, is_lfs

if TYPE_CHECKING:
    from .server import Hub


# Account


def whoami(hub: Hub, request: Request) -> Answer:
    user = signed_in(request)
    token = {"displayName": "test", "role": user.role}
    members = {**dict.fromkeys(user.orgs, "write"), **dict.fromkeys(user.visits, "read")}
    return Answer(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name.title(),
            "isPro": False,
            "orgs": [{"type": "org", "name": org, "roleInOrg": role} for org, role in members.items()],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def signed_in(request: Request) -> User:
    if request.user is None:
        raise Refusal(401, UNKNOWN_USER)
    return request.user


def nothing(hub: Hub, request: Request) -> Answer:
    return Answer()


# Repositories


def create_repo(hub: Hub, request: Request) -> Answer:
    user, asked = signed_in(request), request.json
    namespace = asked.get("organization") or user.name
    repo_id = f"{namespace}/{asked['name']}"
    if not user.writes(namespace):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = {"url": f"{hub.url}/{repo_id}"}
    if repo_id in hub.store.repos:
        return Answer({"error": "You already created this model repo", **url}, 409)
    private = asked.get("visibility") == "private" or asked.get("private", False)  # `private` until huggingface_hub 1
    hub.store.repos[repo_id] = Repo(repo_id, private=private, author=user.name)
    return Answer(url)


def repo_info(hub: Hub, request: Request, repo_id: str, revision: str | None = None) -> Answer:
    repo = hub.store.readable(repo_id, request.user)
    oid = repo.resolve(revision or "main")
    files = repo.commits[oid].files
    card = card_metadata(files["README.md"].content) if "README.md" in files else {}
    blobs = request.query.get("blobs")
    return Answer(
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
            "siblings": [{"rfilename": path, **(described(file) if blobs else {})} for path, file in files.items()],
        }
    )


def described(file: File) -> dict:
    """Returns what the listings tell of a file."""
    told: dict = {"oid": file.git_oid, "blobId": file.git_oid, "size": len(file.content)}
    if file.lfs:
        told["lfs"] = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
    if file.xet_hash:
        told["xetHash"] = file.xet_hash
    return told


def tree(hub: Hub, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
    repo = hub.store.readable(repo_id, request.user)
    oid = repo.resolve(revision)
    start = f"{folder.strip('/')}/" if folder else ""
    entries = {}
    for path, file in repo.commits[oid].files.items():
        if not path.startswith(start):
            continue
        *parents, _ = path.removeprefix(start).split("/")
        if parents and request.query.get("recursive", "").lower() != "true":
            below = start + parents[0]
            oid_of_folder = hashlib.sha1(below.encode()).hexdigest()
            entries[below] = {"type": "directory", "path": below, "oid": oid_of_folder, "size": 0}
        else:
            entries[path] = {"type": "file", "path": path, **described(file)}
    if start and not entries:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return Answer([entries[path] for path in sorted(entries)])


def create_branch(hub: Hub, request: Request, repo_id: str, branch: str) -> Answer:
    repo = hub.store.writable(repo_id, request.user)
    if branch in repo.branches:
        raise Refusal(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.resolve(request.json.get("startingPoint") or "main")
    return Answer()


def auth_check(hub: Hub, request: Request, repo_id: str, write: str | None = None) -> Answer:
    (hub.store.writable if write else hub.store.fetchable)(repo_id, request.user)
    return Answer()


# Upload


def validate_yaml(hub: Hub, request: Request) -> Answer:
    try:
        card_metadata(request.json["content"].encode())
    except ValueError as error:
        return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer({"errors": [], "warnings": []})


def preupload(hub: Hub, request: Request, repo_id: str, revision: str) -> Answer:
    repo = hub.store.writable(repo_id, request.user)
    present = repo.commits[repo.resolve(revision)].files
    modes = []
    for file in request.json["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        known = {"oid": present[path].etag} if path in present else {}  # lets the client leave out what has not changed
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Answer({"files": modes})


def lfs_batch(hub: Hub, request: Request, repo_id: str) -> Answer:
    repo = hub.store.writable(repo_id, request.user)
    objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in request.json["objects"]]
    hub.store.check_room(repo, sum(asked["size"] for asked in objects))
    for wanted in objects:
        if wanted["oid"] not in hub.store.sent:
            href = f"{hub.url}/lfs/{repo_id}/{wanted['oid']}"
            wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(hub: Hub, request: Request, repo_id: str, oid: str) -> Answer:
    # No rights asked here: the public hub's address is signed and carries no token either.
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, f"the content does not have the SHA-256 {oid}")
    hub.store.sent[oid] = request.body
    return Answer(b"")


def lfs_verify(hub: Hub, request: Request, repo_id: str, oid: str) -> Answer:
    hub.store.writable(repo_id, request.user)
    if len(hub.store.sent.get(oid, b"")) != request.json["size"]:
        raise Refusal(404, f"LFS object {oid} is not here")
    return Answer()


def commit(hub: Hub, request: Request, repo_id: str, branch: str) -> Answer:
    repo, user = hub.store.writable(repo_id, request.user), signed_in(request)
    if branch not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    header, *changes = [json.loads(line) for line in request.body.splitlines()]
    parent = header["value"].get("parentCommit")
    if parent and parent != repo.branches[branch]:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[repo.branches[branch]].files)
    for change in changes:
        apply(change["key"], change["value"], files, hub)
    new = {file.sha256: len(file.content) for file in files.values() if file.lfs}
    held = {file.sha256 for old in repo.commits.values() for file in old.files.values()}
    hub.store.check_room(repo, sum(size for sha256, size in new.items() if sha256 not in held))
    try:
        card_metadata(files["README.md"].content if "README.md" in files else b"")
    except ValueError as error:
        raise Refusal(400, f"Invalid metadata in README.md: {error}") from None
    oid = repo.commit(files, header["value"]["summary"], user.name, branch)
    return Answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"})


def apply(kind: str, change: dict, files: dict[str, File], hub: Hub) -> None:
    """Applies one line of a commit to `files`."""
    path = change["path"]
    if kind == "file":
        files[path] = File(base64.b64decode(change["content"]))
    elif kind == "lfsFile":
        sha256 = change["oid"]
        if sha256 not in hub.store.sent:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(hub.store.sent[sha256], lfs=True, xet_hash=hub.xet.hashes.get(sha256))
    elif kind == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif kind == "deletedFolder":
        for inside in [other for other in files if other.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise Refusal(400, f"unknown line of a commit: {kind}")


# Download


def download(hub: Hub, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    repo = hub.store.fetchable(repo_id, request.user)
    oid = repo.resolve(revision)
    file = repo.commits[oid].files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    if file.xet_hash:
        route = f"{hub.url}/api/models/{quote(repo_id)}/xet-read-token/{oid}"
        headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
    return Answer.content(request, file.content, headers)


REPO_ID = r"([\w.-]+(?:/[\w.-]+)?)"
MODEL = f"/api/models/{REPO_ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/agent-harnesses", nothing),
    ("HEAD", "/api/telemetry/.*", nothing),
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
