"""The tests' own hub, spoken to by the real clients."""

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
    """A folder as a model has it: 3 MB of weights in several chunks, a card, a folder below, an empty file."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    tensors = {  # which hf_xet packs by groups of bytes, not at all, and plainly
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


def test_a_folder_comes_back_as_it_was_sent(hub, folder, tmp_path):
    push(folder)
    assert hub.store.repos[ID].files == contents(folder)
    for name in contents(folder):
        with open(huggingface_hub.hf_hub_download(ID, name), "rb") as file:
            assert file.read() == contents(folder)[name]
    back = huggingface_hub.snapshot_download(ID, local_dir=tmp_path / "back", ignore_patterns=".gitattributes")
    assert contents(tmp_path / "back") == contents(folder), back
    info = huggingface_hub.model_info(ID, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename != ".gitattributes"}
    assert sizes == {name: len(content) for name, content in contents(folder).items()}
    assert info.library_name == "timm" and info.tags == ["mine"]
    assert huggingface_hub.repo_exists(ID) and not huggingface_hub.file_exists(ID, "absent.txt")


def test_the_weights_went_the_way_the_mode_says(hub, folder):
    push(folder)
    xet = "xorbs" in "".join(logged.path for logged in hub.requests(WEIGHTS))
    assert xet == (hub.mode == "xet") and hub.requests(WEIGHTS)


def test_sending_the_same_again_makes_no_commit(hub, folder):
    first, second = push(folder), push(folder)
    assert first.oid == second.oid and len(hub.requests(WEIGHTS)) == len(hub.requests(COMMIT)) == 1
    assert hub.store.repos[ID].titles == ["Add the model", "initial commit"]


def test_an_emptied_hub_gets_everything_again(hub, folder):
    push(folder)
    hub.reset(hub.users)
    push(folder)
    assert hub.store.repos[ID].files == contents(folder) and hub.requests(WEIGHTS)


def test_a_process_of_its_own_speaks_to_the_same_hub(hub, folder):
    code = """if True:
        import sys, huggingface_hub
        huggingface_hub.create_repo(sys.argv[1])
        huggingface_hub.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
        print(huggingface_hub.whoami()["name"])"""
    assert run_python(code, ID, str(folder)).split() == ["alice"]
    assert hub.store.repos[ID].files == contents(folder)
    assert all(("xorbs" in logged.path) == (hub.mode == "xet") for logged in hub.requests(WEIGHTS))


def test_creating(hub):
    url = huggingface_hub.create_repo("model", private=True)
    assert url.repo_id == ID and hub.store.repos[ID].private
    assert huggingface_hub.create_repo(ID, exist_ok=True) == url
    with pytest.raises(errors.HfHubHTTPError) as refused:
        huggingface_hub.create_repo(ID)
    assert refused.value.response.status_code == 409
    huggingface_hub.create_repo("acme/model")
    assert not huggingface_hub.model_info("acme/model").private


def test_branches_parents_and_deletions(hub, folder):
    first = push(folder)
    huggingface_hub.create_branch(ID, branch="second/try")
    api = huggingface_hub.HfApi()
    options = {"repo_id": ID, "revision": "second/try", "commit_message": "Other"}
    api.upload_folder(folder_path=folder / "adapter", delete_patterns="*.safetensors", **options)
    on_branch = set(huggingface_hub.list_repo_files(ID, revision="second/try"))
    assert "with space ü.json" in on_branch and "model.safetensors" not in on_branch
    assert hub.store.repos[ID].files == contents(folder), "main is as it was"
    with pytest.raises(errors.RevisionNotFoundError):
        api.upload_folder(folder_path=folder, repo_id=ID, revision="absent")
    with pytest.raises(errors.HfHubHTTPError) as refused:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", parent_commit="0" * 40, repo_id=ID)
    assert refused.value.response.status_code == 412
    assert huggingface_hub.model_info(ID, revision=first.oid).sha == first.oid
    assert [entry.path for entry in api.list_repo_tree(ID, "adapter")] == ["adapter/with space ü.json"]


def test_a_bad_card_is_refused_before_the_weights(hub, folder, tmp_path):
    results = [{"task": {"type": "t"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "accuracy"}]}]
    (tmp_path / "README.md").write_text(
        "---\n" + json.dumps({"model-index": [{"name": "m", "results": results}]}) + "\n---\n"
    )
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md.\n.*results\[0\].metrics\[0\].value"):
        push(tmp_path)
    assert not hub.requests(WEIGHTS)


def test_the_oldest_models_have_no_namespace(hub):
    hub.add_repo("bert-base", {"config.json": b"{}"})
    with open(huggingface_hub.hf_hub_download("bert-base", "config.json"), "rb") as file:
        assert file.read() == b"{}"
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        huggingface_hub.auth_check("bert-base", write=True)


def test_a_hub_answers_while_it_is_open():
    def status(hub: Hub) -> int | None:
        line = http.client.HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=5)
        try:
            line.request("GET", "/api/whoami-v2")
            return line.getresponse().status
        except ConnectionRefusedError:
            return None

    hub = Hub({})
    assert status(hub) is None
    with hub:
        assert status(hub) == 401
    assert status(hub) is None


# Rights


REFUSALS = {  # what is done: the token, the status, the client's error
    "create without a token": (False, 401, errors.HfHubHTTPError),
    "create with a token that is none": ("hf_nobody", 401, errors.HfHubHTTPError),
    "create with a token that may only read": ("hf_alice_read", 403, errors.HfHubHTTPError),
    "create where one is no member": ("hf_bob", 403, errors.HfHubHTTPError),
    "upload without a token": (False, 401, errors.RepositoryNotFoundError),
    "upload with a token that is none": ("hf_nobody", 401, errors.HfHubHTTPError),
    "upload with a token that may only read": ("hf_alice_read", 403, errors.HfHubHTTPError),
    "upload to another's": ("hf_bob", 403, errors.HfHubHTTPError),
    "write to another's": ("hf_bob", 403, errors.HfHubHTTPError),
    "upload to another's private": ("hf_bob", 404, errors.RepositoryNotFoundError),
    "download another's private": ("hf_bob", 404, errors.RepositoryNotFoundError),
    "download the private without a token": (False, 401, errors.RepositoryNotFoundError),
    "download the gated": ("hf_bob", 403, errors.GatedRepoError),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_who_may_not_is_refused_as_by_the_public_hub(hub, folder, case):
    token, status, error = REFUSALS[case]
    hub.add_repo(ID, {"config.json": b"{}"}, private="private" in case, gated="gated" in case)
    before = hub.store.repos[ID].files
    api = huggingface_hub.HfApi(token=token)
    with pytest.raises(error) as refused:
        if case.startswith("create"):
            api.create_repo("acme/other" if "member" in case else "alice/other")
        elif case.startswith("write"):
            api.auth_check(ID, write=True)
        elif case.startswith("upload"):
            api.upload_folder(repo_id=ID, folder_path=folder)
        else:
            api.hf_hub_download(ID, "config.json")
    assert refused.value.response.status_code == status
    assert not hub.requests(WEIGHTS) and hub.store.repos[ID].files == before and len(hub.store.repos) == 1


def test_members_and_the_admitted_are_let_in(hub):
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


def test_private_storage_is_limited(hub, folder):
    hub.store.private_limit = 1_000_000
    with pytest.raises(errors.HfHubHTTPError) as refused:
        push(folder, private=True)
    assert refused.value.response.status_code == 403 and "storage limit" in refused.value.server_message
    assert hub.store.repos[ID].files == {}
    push(folder, "alice/public")
    hub.store.private_limit = 4_000_000
    push(folder, ID)
    with pytest.raises(errors.HfHubHTTPError):
        push(folder, "alice/second", private=True)


# Faults


@pytest.mark.parametrize("action", [503, "reset", "drop", "lost"])
def test_one_fault_in_the_weights_is_survived(hub, folder, action):
    hub.faults.append(Fault(WEIGHTS, action))
    push(folder)
    assert [logged.status for logged in hub.requests(WEIGHTS)] == [action, 200]
    assert hub.store.repos[ID].files == contents(folder)


@pytest.mark.parametrize("action", [403, "reset"])
def test_weights_that_never_arrive_leave_no_commit_and_a_later_push_succeeds(hub, folder, action):
    hub.faults.append(Fault(WEIGHTS, action, times=math.inf))
    with pytest.raises((RuntimeError, ConnectionError, errors.HfHubHTTPError)):
        push(folder)
    assert hub.store.repos[ID].titles == ["initial commit"] and not hub.requests(COMMIT)
    hub.faults.clear()
    push(folder)
    assert hub.store.repos[ID].files == contents(folder)


def test_a_token_revoked_on_the_way_stops_the_push(hub, folder):
    hub.faults.append(Fault(WEIGHTS, lambda: hub.users.pop("hf_alice")))
    with pytest.raises((RuntimeError, ConnectionError)) as stopped:
        push(folder)
    assert "401" in f"{stopped.value} {stopped.value.__cause__}"
    assert hub.store.repos[ID].titles == ["initial commit"]


def test_a_lost_answer_differs_from_a_dropped_request_by_what_was_done(hub):
    for action, there in {"drop": False, "lost": True}.items():
        hub.faults.append(Fault(CREATE, action))
        with pytest.raises(Exception, match="disconnected"):
            huggingface_hub.create_repo(f"alice/{action}")
        assert huggingface_hub.repo_exists(f"alice/{action}") == there


def test_a_commit_whose_answer_is_lost_is_there_and_can_be_repeated(hub, folder):
    hub.faults.append(Fault(COMMIT, "lost"))
    try:
        push(folder)  # huggingface_hub repeats it when it sends by Xet
    except Exception:
        assert hub.mode == "lfs"
    assert hub.store.repos[ID].files == contents(folder)
    commits = hub.store.repos[ID].titles
    push(folder)
    assert hub.store.repos[ID].titles == commits


def test_a_status_comes_with_the_headers_and_body_of_the_fault(hub):
    hub.faults.append(Fault("whoami", 429, headers={"Retry-After": "7"}, body="too many requests"))
    with pytest.raises(errors.HfHubHTTPError) as limited:
        huggingface_hub.whoami()
    response = limited.value.response
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert json.loads(response.text) == {"error": "too many requests"}
    assert huggingface_hub.whoami()["name"] == "alice", "one fault, one request"


def test_a_stall_delays_and_ends_with_the_test(hub, folder):
    hub.faults.append(Fault(PREUPLOAD, "stall", seconds=0.3))
    before = time.monotonic()
    push(folder)
    assert time.monotonic() - before > 0.3
    hub.faults.append(Fault(CREATE, "stall"))
    ended = []

    def create():
        try:
            huggingface_hub.create_repo("alice/late")
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=create, daemon=True)
    thread.start()
    while hub.faults[-1].times:
        time.sleep(0.01)
    hub.reset(hub.users)
    thread.join(5)
    assert ended and not hub.store.repos, "nothing of it reaches the next test"
