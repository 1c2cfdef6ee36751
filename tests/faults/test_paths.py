"""Validation of image paths in tables, links, archives and saved datasets: paths stay inside the data folder."""

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


def save_image(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8), color).save(path)
    return path


def load(source, **options):
    return load_splits(DataConfig(source=str(source), **{"validation_fraction": 0.0} | options))


@pytest.fixture
def root(tmp_path):
    """A data folder with two images, and a secret image outside of it."""
    for name in ("a", "b"):
        save_image(tmp_path / "data" / "img" / f"{name}.png")
    save_image(tmp_path / "secret" / "key.png")
    os.symlink(tmp_path / "secret" / "key.png", tmp_path / "data" / "img" / "link.png")
    os.symlink(tmp_path / "secret", tmp_path / "data" / "folder")
    os.symlink(tmp_path / "data" / "img" / "a.png", tmp_path / "data" / "inner.png")
    return tmp_path


def write_table(folder, cells, split="train"):
    rows = ["image,label", *(f'"{cell}",{"xy"[number % 2]}' for number, cell in enumerate(cells))]
    (folder / f"{split}.csv").write_text("\n".join(rows))


@pytest.fixture
def no_open(monkeypatch):
    """Asserts that no image is opened or downloaded."""
    opened = []
    monkeypatch.setattr(PILImage, "open", lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr("datasets.features.image.xopen", lambda path, *_, **__: opened.append(path))
    yield opened
    assert not opened


OUTSIDE = {
    "../secret/key.png": "is outside the data folder",
    "img/../../secret/key.png": "is outside the data folder",
    "{root}/secret/key.png": "is outside the data folder",
    "/etc/passwd.png": "is outside the data folder",
    "../data-too/key.png": "is outside the data folder",
    "img/link.png": "is outside the data folder",
    "folder/key.png": "is outside the data folder",
    "..": "is outside the data folder",
    "img/../..": "is outside the data folder",
    "file:///{root}/secret/key.png": "is a URL",
    "file:/etc/passwd.png": "is a URL",
    "http://metadata.invalid/latest/meta-data.png": "is a URL",
    "HTTPS://example.org/a.png": "is a URL",
    "hf://datasets/user/x/a.png": "is a URL",
    "s3://bucket/a.png": "is a URL",
    "zip://a.png::data.zip": "is a URL",
    "img/a.png::data.zip": "is a URL",
    "data:image/png;base64,AAAA.png": "is a URL",
    "~/key.png": "starts with ~",
    "~root/key.png": "starts with ~",
}


@pytest.mark.parametrize("cell", OUTSIDE)
@pytest.mark.parametrize("column", [None, "image"])
def test_path_outside_data_folder_raises_before_open(cell, column, root, no_open):
    write_table(root / "data", ["img/a.png", "img/b.png", cell.format(root=root)])
    with pytest.raises(DataError) as caught:
        load(root / "data", image_column=column)
    message = str(caught.value)
    assert "train column 'image' has 1 invalid path(s): row 2 (" in message
    assert OUTSIDE[cell] in message and "relative to the data folder" in message


def test_path_with_nul_raises(root):
    (root / "data" / "train.jsonl").write_text(json.dumps({"image": "img/a.png\0.png", "label": "x"}) + "\n")
    with pytest.raises(DataError, match="contains a NUL character"):
        load(root / "data")
    assert path_problem("a\0b", str(root)) == "contains a NUL character"


def test_paths_are_relative_to_table_not_cwd(root, monkeypatch):
    write_table(root / "data", ["img/a.png", "./img/../img/b.png", f"{root}/data/img/a.png", "inner.png"])
    (root / "elsewhere").mkdir()
    for cwd in (root, root / "data", root / "elsewhere"):
        monkeypatch.chdir(cwd)
        for source in (root / "data", root / "data" / "train.csv", os.path.relpath(root / "data")):
            splits = load(source)
            ImageClassification(splits)  # reads the headers
            assert [image.size for image in splits["train"]["image"]] == [(8, 8)] * 4


def test_image_in_cwd_is_not_used_for_table(root, monkeypatch):
    save_image(root / "img" / "only_here.png")
    write_table(root / "data", ["img/only_here.png", "img/a.png"])
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match=r"1 unreadable image\(s\): row 0 .*data/img/only_here\.png"):
        ImageClassification(load("data"))


def test_text_table_with_image_urls_skips_column(root, capsys):
    rows = [{"text": f"row {n}", "label": "xy"[n % 2], "photo": "https://example.org/a.png"} for n in range(4)]
    (root / "data" / "train.json").write_text(json.dumps(rows))
    splits = load(root / "data")
    assert TextClassification(splits).inputs.columns == ["text"]
    assert "column 'photo' is ignored: train column 'photo' has 4 invalid path(s)" in capsys.readouterr().out
    with pytest.raises(DataError, match="no image column found"):
        ImageClassification(splits)


def test_strings_without_image_extension_are_not_paths(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\n/usr/bin,x\nhttp://y,y\n")
    splits = load(tmp_path)
    assert splits["train"]["path"][:] == ["/usr/bin", "http://y"]
    with pytest.raises(DataError, match="no image column found"):
        ImageClassification(splits)


@pytest.mark.parametrize("path", ["../secret/key.png", "{root}/secret/key.png", "http://metadata.invalid/a.png"])
def test_parquet_image_paths_outside_folder_raise(path, root, no_open):
    features = Features({"image": Image(), "label": Value("string")})
    rows = {"image": [{"path": path.format(root=root), "bytes": None}] * 2, "label": ["x", "y"]}
    # by pyarrow: to_parquet() of `datasets` requests the sizes of files and URLs
    pq.write_table(Dataset.from_dict(rows, features=features).data.table, root / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"train column 'image' has 2 invalid path\(s\): row 0"):
        load(root / "data")


@pytest.mark.parametrize("path", ["../secret/key.png", "{root}/secret/key.png", "link.png"])
def test_metadata_path_outside_folder_raises(path, root):
    folder = root / "images"
    save_image(folder / "train" / "a.png")
    os.symlink(root / "secret" / "key.png", folder / "train" / "link.png")
    lines = ["file_name,label", "a.png,x", f"{path.format(root=root)},y"]
    (folder / "train" / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(DataError):
        load(folder)


def test_links_in_image_folder_are_followed(root):
    """Folders of links into a common store are usual; links in cells raise (see above)."""
    for label in ("x", "y"):
        (root / "linked" / label).mkdir(parents=True)
        os.symlink(root / "secret" / "key.png", root / "linked" / label / "0.png")
    splits = load(root / "linked")
    ImageClassification(splits)
    assert len(splits["train"]) == 2 and splits["train"][0]["image"].size == (8, 8)


def test_zip_in_image_folder_is_not_unpacked(root):
    """`datasets` unpacks zip files in image folders; a member `../x` would be written outside of the folder."""
    for label in ("x", "y"):
        save_image(root / "zipped" / label / "0.png")
    with zipfile.ZipFile(root / "zipped" / "x" / "more.zip", "w") as archive:
        archive.write(root / "secret" / "key.png", "inside.png")
        archive.write(root / "secret" / "key.png", "../../slipped.png")
    splits = load(root / "zipped")
    assert len(splits["train"]) == 2
    assert not list(root.rglob("slipped.png")) and not list(root.rglob("inside.png"))


def test_saved_dataset_with_embedded_images_is_read(root):
    features = Features({"image": Image(), "label": Value("string")})
    rows = Dataset.from_dict({"image": [str(root / "secret/key.png")] * 2, "label": ["x", "y"]}, features=features)
    DatasetDict(train=rows).save_to_disk(root / "saved")  # with the bytes of the images
    assert load(root / "saved")["train"][0]["image"].size == (8, 8)


def test_hub_dataset_with_local_paths_raises(root, monkeypatch):
    """Hub datasets are untrusted; their `image` may be /home/me/scan.png."""
    rows = Dataset.from_dict({"image": [str(root / "secret/key.png")] * 2, "label": ["x", "y"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=rows))
    with pytest.raises(DataError, match="has image paths, but Hub datasets have no base folder"):
        load("user/images")
    stored = rows.cast_column("image", Image())
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=stored))
    with pytest.raises(DataError, match=r"has 2 invalid path\(s\)"):
        load("user/images")


def test_predict_rejects_paths_outside_table_folder(root, image_run, tmp_path):
    from hftl import ImageClassification as Task
    from hftl.data.splits import Splits
    from hftl.inference.batch_inference import _rows_to_predict

    write_table(root / "data", ["img/a.png", "img/b.png"])
    task = Task(Splits(dict(load(root / "data")), DataConfig()))
    (root / "data" / "new.csv").write_text(f'image\nimg/a.png\n"{root}/secret/key.png"\n')
    with pytest.raises(DataError, match=r"has 1 invalid path\(s\): row 1"):
        _rows_to_predict(task, str(root / "data" / "new.csv"), None)
    (root / "data" / "new.csv").write_text("image\nimg/a.png\nimg/b.png\n")
    rows, _ = _rows_to_predict(task, str(root / "data" / "new.csv"), None)
    assert [image.size for image in rows["image"]] == [(8, 8)] * 2
