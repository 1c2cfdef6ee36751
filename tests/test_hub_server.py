"""The tests' own hub, spoken to by the real clients."""

from __future__ import annotations

import huggingface_hub
import numpy as np
import pytest
from hub import COMMIT, WEIGHTS
from safetensors.numpy import save_file

ID = "alice/model"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder as a model has it: 3 MB of weights in several chunks, a card, a folder below, an empty file."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    # Random, constant and smooth: hf_xet stores, packs, and packs by groups of bytes.
    smooth = np.sin(np.linspace(0, 9, 250_000)).astype(np.float32)
    tensors = {"random": rng.random(250_000, np.float32), "zeros": np.zeros(250_000, np.float32), "smooth": smooth}
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
