"""Hub server of the tests (`tests/hub`), with requests by huggingface_hub and hf_xet."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time

import huggingface_hub
import numpy as np
import pytest
from conftest import run_python
from hub import COMMIT, CREATE, PREUPLOAD, WEIGHTS, Fault, Hub
from huggingface_hub import errors
from safetensors.numpy import save_file

ID = "alice/model"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Model folder: 3 MB of weights in several chunks, a card, a subfolder, an empty file."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    tensors = {  # one per compression scheme of hf_xet: LZ4 of grouped bytes, stored, LZ4
        "float": rng.random(250_000, np.float32),
        "random": rng.integers(0, 256, 1_000_000, np.uint8),
        "zero": np.zeros(1_000_000, np.uint8),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlibrary_name: timm\ntags: [mine]\n---\n# A model\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "with space ü.json").write_text("{}")
    (folder / "empty.txt").touch()
    return folder


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def push(folder, repo_id: str = ID, **options):
    huggingface_hub.create_repo(repo_id, exist_ok=True, **options)
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add the model")


def test_download_matches_uploaded_folder(hub, folder, tmp_path):
    push(folder)
    assert hub.store.repos[ID].files == contents(folder)
    for name in contents(folder):
        with open(huggingface_hub.hf_hub_download(ID, name), "rb") as file:
            assert file.read() == contents(folder)[name]
    target = tmp_path / "downloaded"
    huggingface_hub.snapshot_download(ID, local_dir=target, ignore_patterns=".gitattributes")
    assert contents(target) == contents(folder)
    info = huggingface_hub.model_info(ID, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename != ".gitattributes"}
    assert sizes == {name: len(content) for name, content in contents(folder).items()}
    assert info.library_name == "timm" and info.tags == ["mine"]
    assert huggingface_hub.repo_exists(ID) and not huggingface_hub.file_exists(ID, "absent.txt")


def test_upload_uses_protocol_of_mode(hub, folder):
    push(folder)
    uses_xet = "xorbs" in "".join(logged.path for logged in hub.requests(WEIGHTS))
    assert uses_xet == (hub.mode == "xet") and hub.requests(WEIGHTS)


def test_repeated_upload_creates_no_commit(hub, folder):
    first, second = push(folder), push(folder)
    assert first.oid == second.oid and len(hub.requests(WEIGHTS)) == len(hub.requests(COMMIT)) == 1
    assert hub.store.repos[ID].titles == ["Add the model", "initial commit"]


def test_upload_after_reset_sends_all_files(hub, folder):
    push(folder)
    hub.reset(hub.users)
    push(folder)
    assert hub.store.repos[ID].files == contents(folder) and hub.requests(WEIGHTS)


def test_upload_from_child_process_reaches_hub(hub, folder):
    code = """if True:
        import sys, huggingface_hub
        huggingface_hub.create_repo(sys.argv[1])
        huggingface_hub.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
        print(huggingface_hub.whoami()["name"])"""
    assert run_python(code, ID, str(folder)).split() == ["alice"]
    assert hub.store.repos[ID].files == contents(folder)
    assert all(("xorbs" in logged.path) == (hub.mode == "xet") for logged in hub.requests(WEIGHTS))


def test_create_repo_sets_visibility_and_rejects_duplicates(hub):
    url = huggingface_hub.create_repo("model", private=True)
    assert url.repo_id == ID and hub.store.repos[ID].private
    assert huggingface_hub.create_repo(ID, exist_ok=True) == url
    with pytest.raises(errors.HfHubHTTPError) as caught:
        huggingface_hub.create_repo(ID)
    assert caught.value.response.status_code == 409
    huggingface_hub.create_repo("acme/model")
    assert not huggingface_hub.model_info("acme/model").private


def test_commits_support_branches_parents_and_deletions(hub, folder):
    first = push(folder)
    huggingface_hub.create_branch(ID, branch="second/try")
    api = huggingface_hub.HfApi()
    options = {"repo_id": ID, "revision": "second/try", "commit_message": "Other"}
    api.upload_folder(folder_path=folder / "adapter", delete_patterns="*.safetensors", **options)
    branch_files = set(huggingface_hub.list_repo_files(ID, revision="second/try"))
    assert "with space ü.json" in branch_files and "model.safetensors" not in branch_files
    assert hub.store.repos[ID].files == contents(folder), "main is unchanged"
    with pytest.raises(errors.RevisionNotFoundError):
        api.upload_folder(folder_path=folder, repo_id=ID, revision="absent")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", parent_commit="0" * 40, repo_id=ID)
    assert caught.value.response.status_code == 412
    assert huggingface_hub.model_info(ID, revision=first.oid).sha == first.oid
    assert [entry.path for entry in api.list_repo_tree(ID, "adapter")] == ["adapter/with space ü.json"]


def test_upload_rejects_invalid_card_before_weights(hub, folder, tmp_path):
    results = [{"task": {"type": "t"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "accuracy"}]}]
    (tmp_path / "README.md").write_text(
        "---\n" + json.dumps({"model-index": [{"name": "m", "results": results}]}) + "\n---\n"
    )
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md.\n.*results\[0\].metrics\[0\].value"):
        push(tmp_path)
    assert not hub.requests(WEIGHTS)


def test_repo_without_namespace_is_readable(hub):
    hub.add_repo("bert-base", {"config.json": b"{}"})
    with open(huggingface_hub.hf_hub_download("bert-base", "config.json"), "rb") as file:
        assert file.read() == b"{}"
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        huggingface_hub.auth_check("bert-base", write=True)


def test_hub_responds_only_inside_context():
    def status(hub: Hub) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=5)
        try:
            connection.request("GET", "/api/whoami-v2")
            return connection.getresponse().status
        except ConnectionRefusedError:
            return None

    hub = Hub({})
    assert status(hub) is None
    with hub:
        assert status(hub) == 401
    assert status(hub) is None


# permissions


FORBIDDEN = {  # action: token, status, error class of the client
    "create without token": (False, 401, errors.HfHubHTTPError),
    "create with invalid token": ("hf_nobody", 401, errors.HfHubHTTPError),
    "create with read token": ("hf_alice_read", 403, errors.HfHubHTTPError),
    "create in other organization": ("hf_bob", 403, errors.HfHubHTTPError),
    "upload without token": (False, 401, errors.RepositoryNotFoundError),
    "upload with invalid token": ("hf_nobody", 401, errors.HfHubHTTPError),
    "upload with read token": ("hf_alice_read", 403, errors.HfHubHTTPError),
    "upload to repo of other user": ("hf_bob", 403, errors.HfHubHTTPError),
    "write to repo of other user": ("hf_bob", 403, errors.HfHubHTTPError),
    "upload to private repo of other user": ("hf_bob", 404, errors.RepositoryNotFoundError),
    "download private repo of other user": ("hf_bob", 404, errors.RepositoryNotFoundError),
    "download private repo without token": (False, 401, errors.RepositoryNotFoundError),
    "download gated repo": ("hf_bob", 403, errors.GatedRepoError),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_requests_without_permission_return_error_status(hub, folder, case):
    token, status, error = FORBIDDEN[case]
    hub.add_repo(ID, {"config.json": b"{}"}, private="private" in case, gated="gated" in case)
    before = hub.store.repos[ID].files
    api = huggingface_hub.HfApi(token=token)
    with pytest.raises(error) as caught:
        if case.startswith("create"):
            api.create_repo("acme/other" if "organization" in case else "alice/other")
        elif case.startswith("write"):
            api.auth_check(ID, write=True)
        elif case.startswith("upload"):
            api.upload_folder(repo_id=ID, folder_path=folder)
        else:
            api.hf_hub_download(ID, "config.json")
    assert caught.value.response.status_code == status
    assert not hub.requests(WEIGHTS) and hub.store.repos[ID].files == before and len(hub.store.repos) == 1


def test_members_and_admitted_users_can_read(hub):
    hub.add_repo("museum/model", {"config.json": b"1"}, private=True)
    assert huggingface_hub.hf_hub_download("museum/model", "config.json")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        huggingface_hub.auth_check("museum/model", write=True)
    repo = hub.add_repo("bob/model", {"config.json": b"2"}, gated=True)
    with pytest.raises(errors.GatedRepoError):
        huggingface_hub.auth_check("bob/model")
    repo.admitted.add("alice")
    assert huggingface_hub.hf_hub_download("bob/model", "config.json")
    assert {org["name"] for org in huggingface_hub.whoami()["orgs"]} == {"acme", "museum"}


def test_upload_rejects_files_over_private_storage_limit(hub, folder):
    hub.store.private_limit = 1_000_000
    with pytest.raises(errors.HfHubHTTPError) as caught:
        push(folder, private=True)
    assert caught.value.response.status_code == 403 and "storage limit" in caught.value.server_message
    assert hub.store.repos[ID].files == {}
    push(folder, "alice/public")
    hub.store.private_limit = 4_000_000
    push(folder, ID)
    with pytest.raises(errors.HfHubHTTPError):
        push(folder, "alice/second", private=True)


# faults


@pytest.mark.parametrize("action", [503, "reset", "drop", "lost"])
def test_client_retries_after_one_upload_fault(hub, folder, action):
    hub.faults.append(Fault(WEIGHTS, action))
    push(folder)
    assert [logged.status for logged in hub.requests(WEIGHTS)] == [action, 200]
    assert hub.store.repos[ID].files == contents(folder)


@pytest.mark.parametrize("action", [403, "reset"])
def test_failed_upload_creates_no_commit_and_can_be_repeated(hub, folder, action):
    hub.faults.append(Fault(WEIGHTS, action, times=math.inf))
    with pytest.raises((RuntimeError, ConnectionError, errors.HfHubHTTPError)):
        push(folder)
    assert hub.store.repos[ID].titles == ["initial commit"] and not hub.requests(COMMIT)
    hub.faults.clear()
    push(folder)
    assert hub.store.repos[ID].files == contents(folder)


def test_revoked_token_stops_upload(hub, folder):
    hub.faults.append(Fault(WEIGHTS, lambda: hub.users.pop("hf_alice")))
    with pytest.raises((RuntimeError, ConnectionError)) as caught:
        push(folder)
    assert "401" in f"{caught.value} {caught.value.__cause__}"
    assert hub.store.repos[ID].titles == ["initial commit"]


def test_lost_response_is_applied_and_dropped_request_is_not(hub):
    for action, exists in {"drop": False, "lost": True}.items():
        hub.faults.append(Fault(CREATE, action))
        with pytest.raises(Exception, match="disconnected"):
            huggingface_hub.create_repo(f"alice/{action}")
        assert huggingface_hub.repo_exists(f"alice/{action}") == exists


def test_commit_with_lost_response_exists_and_can_be_repeated(hub, folder):
    hub.faults.append(Fault(COMMIT, "lost"))
    try:
        push(folder)  # with Xet, huggingface_hub retries the commit
    except Exception:
        assert hub.mode == "lfs"
    assert hub.store.repos[ID].files == contents(folder)
    commits = hub.store.repos[ID].titles
    push(folder)
    assert hub.store.repos[ID].titles == commits


def test_fault_returns_its_status_headers_and_body(hub):
    hub.faults.append(Fault("whoami", 429, headers={"Retry-After": "7"}, body="too many requests"))
    with pytest.raises(errors.HfHubHTTPError) as caught:
        huggingface_hub.whoami()
    response = caught.value.response
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert json.loads(response.text) == {"error": "too many requests"}
    assert huggingface_hub.whoami()["name"] == "alice", "a fault applies to one request"


def test_stall_delays_request_and_ends_with_reset(hub, folder):
    hub.faults.append(Fault(PREUPLOAD, "stall", seconds=0.3))
    start = time.monotonic()
    push(folder)
    assert time.monotonic() - start > 0.3
    hub.faults.append(Fault(CREATE, "stall"))
    failures = []

    def create():
        try:
            huggingface_hub.create_repo("alice/late")
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=create, daemon=True)
    thread.start()
    while hub.faults[-1].times:
        time.sleep(0.01)
    hub.reset(hub.users)
    thread.join(5)
    assert failures and not hub.store.repos, "the stalled request has no effect after the reset"
