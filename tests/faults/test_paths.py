"""Paths that come from data: they stay in its folder, whatever a cell, a link or an archive says."""

import json
import os
import zipfile

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hftl.config.schema import DataConfig
from hftl.data.paths import path_problem
from hftl.data.source import load_splits
from hftl.errors import DataError
from hftl.tasks.registry import ImageClassification, TextClassification


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8), colour).save(path)
    return path


def load(source, **options):
    return load_splits(DataConfig(source=str(source), **{"validation_fraction": 0.0} | options))


@pytest.fixture
def world(tmp_path):
    """A folder of data with two images, and an image outside of it that nobody gave."""
    for name in ("a", "b"):
        picture(tmp_path / "data" / "img" / f"{name}.png")
    picture(tmp_path / "secret" / "key.png")
    os.symlink(tmp_path / "secret" / "key.png", tmp_path / "data" / "img" / "link.png")
    os.symlink(tmp_path / "secret", tmp_path / "data" / "folder")
    os.symlink(tmp_path / "data" / "img" / "a.png", tmp_path / "data" / "inner.png")
    return tmp_path


def table(folder, cells, split="train"):
    rows = ["image,label", *(f'"{cell}",{"xy"[number % 2]}' for number, cell in enumerate(cells))]
    (folder / f"{split}.csv").write_text("\n".join(rows))


@pytest.fixture
def no_opening(monkeypatch):
    """Notes what is opened as an image or fetched; nothing may be."""
    opened = []
    monkeypatch.setattr(PILImage, "open", lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr("datasets.features.image.xopen", lambda path, *_, **__: opened.append(path))
    yield opened
    assert not opened


OUTSIDE = {
    "../secret/key.png": "leads out of the folder of the data",
    "img/../../secret/key.png": "leads out of the folder of the data",
    "{root}/secret/key.png": "leads out of the folder of the data",
    "/etc/passwd.png": "leads out of the folder of the data",
    "../data-too/key.png": "leads out of the folder of the data",
    "img/link.png": "leads out of the folder of the data",
    "folder/key.png": "leads out of the folder of the data",
    "..": "leads out of the folder of the data",
    "img/../..": "leads out of the folder of the data",
    "file:///{root}/secret/key.png": "is an address",
    "file:/etc/passwd.png": "is an address",
    "http://metadata.invalid/latest/meta-data.png": "is an address",
    "HTTPS://example.org/a.png": "is an address",
    "hf://datasets/user/x/a.png": "is an address",
    "s3://bucket/a.png": "is an address",
    "zip://a.png::data.zip": "is an address",
    "img/a.png::data.zip": "is an address",
    "data:image/png;base64,AAAA.png": "is an address",
    "~/key.png": "begins with ~",
    "~root/key.png": "begins with ~",
}


@pytest.mark.parametrize("cell", OUTSIDE)
@pytest.mark.parametrize("given", [None, "image"])
def test_a_cell_that_leads_elsewhere_is_refused_before_anything_is_opened(cell, given, world, no_opening):
    table(world / "data", ["img/a.png", "img/b.png", cell.format(root=world)])
    with pytest.raises(DataError) as caught:
        load(world / "data", image_column=given)
    message = str(caught.value)
    assert "train column 'image' has 1 path(s) that may not be opened: row 2 (" in message
    assert OUTSIDE[cell] in message and "relative to it" in message


def test_a_nul_in_a_path_is_refused(world):
    (world / "data" / "train.jsonl").write_text(json.dumps({"image": "img/a.png\0.png", "label": "x"}) + "\n")
    with pytest.raises(DataError, match="has a NUL in it"):
        load(world / "data")
    assert path_problem("a\0b", str(world)) == "has a NUL in it"


def test_paths_are_relative_to_the_table_wherever_one_works(world, monkeypatch):
    table(world / "data", ["img/a.png", "./img/../img/b.png", f"{world}/data/img/a.png", "inner.png"])
    (world / "elsewhere").mkdir()
    for place in (world, world / "data", world / "elsewhere"):
        monkeypatch.chdir(place)
        for source in (world / "data", world / "data" / "train.csv", os.path.relpath(world / "data")):
            splits = load(source)
            ImageClassification(splits)  # reads the headers
            assert [image.size for image in splits["train"]["image"]] == [(8, 8)] * 4


def test_a_file_of_the_working_folder_is_not_taken_for_one_of_the_table(world, monkeypatch):
    picture(world / "img" / "only_here.png")
    table(world / "data", ["img/only_here.png", "img/a.png"])
    monkeypatch.chdir(world)
    with pytest.raises(DataError, match=r"1 unreadable image\(s\): row 0 .*data/img/only_here\.png"):
        ImageClassification(load("data"))


def test_a_table_of_texts_may_hold_addresses_of_images(world, capsys):
    rows = [{"text": f"row {n}", "label": "xy"[n % 2], "picture": "https://example.org/a.png"} for n in range(4)]
    (world / "data" / "train.json").write_text(json.dumps(rows))
    splits = load(world / "data")
    assert TextClassification(splits).inputs.columns == ["text"]
    assert "column 'picture' is not used: train column 'picture' has 4 path(s)" in capsys.readouterr().out
    with pytest.raises(DataError, match="no image column found"):
        ImageClassification(splits)


def test_other_texts_are_not_taken_for_paths(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\n/usr/bin,x\nhttp://y,y\n")
    splits = load(tmp_path)
    assert splits["train"]["path"][:] == ["/usr/bin", "http://y"]
    with pytest.raises(DataError, match="no image column found"):
        ImageClassification(splits)


@pytest.mark.parametrize("bad", ["../secret/key.png", "{root}/secret/key.png", "http://metadata.invalid/a.png"])
def test_images_that_a_parquet_holds_by_path_are_looked_at_too(bad, world, no_opening):
    features = Features({"image": Image(), "label": Value("string")})
    rows = {"image": [{"path": bad.format(root=world), "bytes": None}] * 2, "label": ["x", "y"]}
    # by pyarrow, since to_parquet() of `datasets` itself asks for the sizes of files and addresses
    pq.write_table(Dataset.from_dict(rows, features=features).data.table, world / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"train column 'image' has 2 path\(s\) that may not be opened: row 0"):
        load(world / "data")


@pytest.mark.parametrize("bad", ["../secret/key.png", "{root}/secret/key.png", "link.png"])
def test_a_metadata_table_stays_in_its_folder(bad, world):
    folder = world / "images"
    picture(folder / "train" / "a.png")
    os.symlink(world / "secret" / "key.png", folder / "train" / "link.png")
    lines = ["file_name,label", "a.png,x", f"{bad.format(root=world)},y"]
    (folder / "train" / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(DataError):
        load(folder)


def test_links_in_a_folder_of_images_are_its_owners_and_are_followed(world):
    """Folders of links into a common store are usual; a cell that names one is refused above."""
    for label in ("x", "y"):
        (world / "linked" / label).mkdir(parents=True)
        os.symlink(world / "secret" / "key.png", world / "linked" / label / "0.png")
    splits = load(world / "linked")
    ImageClassification(splits)
    assert len(splits["train"]) == 2 and splits["train"][0]["image"].size == (8, 8)


def test_an_archive_in_a_folder_of_images_is_never_unpacked(world):
    """`datasets` unpacks the zip files that it finds among images; a member `../x` would leave its folder there."""
    for label in ("x", "y"):
        picture(world / "zipped" / label / "0.png")
    with zipfile.ZipFile(world / "zipped" / "x" / "more.zip", "w") as archive:
        archive.write(world / "secret" / "key.png", "inside.png")
        archive.write(world / "secret" / "key.png", "../../slipped.png")
    splits = load(world / "zipped")
    assert len(splits["train"]) == 2
    assert not list(world.rglob("slipped.png")) and not list(world.rglob("inside.png"))


def test_a_saved_data_set_holds_its_images_or_is_refused(world):
    features = Features({"image": Image(), "label": Value("string")})
    rows = Dataset.from_dict({"image": [str(world / "secret/key.png")] * 2, "label": ["x", "y"]}, features=features)
    DatasetDict(train=rows).save_to_disk(world / "saved")  # with the bytes of the images
    assert load(world / "saved")["train"][0]["image"].size == (8, 8)


def test_rows_of_the_hub_cannot_name_files_of_this_machine(world, monkeypatch):
    """A hub data set is a table of somebody; its `image` may be /home/me/scan.png."""
    rows = Dataset.from_dict({"image": [str(world / "secret/key.png")] * 2, "label": ["x", "y"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=rows))
    with pytest.raises(DataError, match="there is no folder that they could be relative to"):
        load("somebody/pictures")
    stored = rows.cast_column("image", Image())
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=stored))
    with pytest.raises(DataError, match="may not be opened"):
        load("somebody/pictures")


def test_predicting_a_table_looks_at_its_paths(world, image_run, tmp_path):
    from hftl import ImageClassification as Task
    from hftl.data.splits import Splits
    from hftl.inference.batch_inference import _rows_to_predict

    table(world / "data", ["img/a.png", "img/b.png"])
    task = Task(Splits(dict(load(world / "data")), DataConfig()))
    (world / "data" / "new.csv").write_text(f'image\nimg/a.png\n"{world}/secret/key.png"\n')
    with pytest.raises(DataError, match=r"has 1 path\(s\) that may not be opened: row 1"):
        _rows_to_predict(task, str(world / "data" / "new.csv"), None)
    (world / "data" / "new.csv").write_text("image\nimg/a.png\nimg/b.png\n")
    rows, _ = _rows_to_predict(task, str(world / "data" / "new.csv"), None)
    assert [image.size for image in rows["image"]] == [(8, 8)] * 2
