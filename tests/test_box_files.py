"""Detection layouts (COCO, VOC, objects columns) and invalid boxes; the reference is the generated scenes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from detection_data import COUNTS, coco, make_coco, make_scenes, make_voc, save_images

import hftl
from hftl.errors import DataError, HftlError
from hftl.tasks.targets.detection.bounding_boxes import find_objects


def load(folder, **options):
    return hftl.load_splits(hftl.DataConfig(source=str(folder), **options))


def read(rows):
    """Returns image shape and objects (class, x0, y0, x1, y1) per row."""
    column = find_objects(rows.features, None)[1]
    names = column.names or ("blue", "red")
    contents = []
    for row in rows:
        objects = column.read(row["objects"], {name: number for number, name in enumerate(names)}, (48, 64))
        boxes = [
            (names[index], *box) for index, box in zip(objects.classes.tolist(), objects.boxes.tolist(), strict=True)
        ]
        contents.append((np.asarray(row["image"]).shape, sorted(boxes)))
    return contents


def expected_rows(split):
    scenes = list(make_scenes(split))
    return [(p.shape, sorted((k, x, y, x + w, y + h) for k, x, y, w, h in objects)) for _, p, objects in scenes]


@pytest.mark.parametrize(
    ("json_name", "image_folder"),
    [
        ("{split}.coco.json", "images/{split}"),
        ("annotations/instances_{split}2017.json", "{split}2017"),
        ("{split}/_annotations.coco.json", "{split}"),
        ("{split}.json", "images"),
    ],
)
def test_coco_layouts_return_equal_rows(json_name, image_folder, tmp_path):
    splits = load(make_coco(tmp_path, json_name, image_folder))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "validation": 3, "test": 3}
    for folder_name, split in {"train": "train", "val": "validation", "test": "test"}.items():
        assert read(splits[split]) == expected_rows(folder_name)
    assert find_objects(splits["train"].features, None)[1].names == ("blue", "red")  # by id, without unused categories


@pytest.mark.parametrize(
    ("xml_folder", "image_folder", "lists"),
    [
        ("{split}", "{split}", False),
        ("Annotations", "JPEGImages", True),
        ("voc/{split}", "images/{split}", False),
    ],
)
def test_voc_layouts_return_equal_rows(xml_folder, image_folder, lists, tmp_path):
    splits = load(make_voc(tmp_path, xml_folder, image_folder, lists))
    for folder_name, split in {"train": "train", "val": "validation", "test": "test"}.items():
        assert read(splits[split]) == expected_rows(folder_name)


def test_voc_renamed_image_matches_xml_name(tmp_path):
    folder = make_voc(tmp_path)
    for file in (folder / "train").glob("*.xml"):
        file.write_text(file.read_text().replace("<filename>", "<filename>before_"))
    assert read(load(folder)["train"]) == expected_rows("train")


def test_voc_moved_image_folder_is_found_again(tmp_path):
    folder = make_voc(tmp_path, "Annotations", "JPEGImages", lists=True)
    before = read(load(folder)["train"])
    (folder / "JPEGImages").rename(folder / "images")
    assert read(load(folder)["train"]) == before


def test_voc_empty_split_list_is_skipped(tmp_path):
    folder = make_voc(tmp_path, "Annotations", "JPEGImages", lists=True)
    (folder / "ImageSets/Main/test.txt").write_text("\n")
    assert set(load(folder)) == {"train", "validation"}


def test_coco_string_category_ids_match_integers(tmp_path):
    def change(content):
        for box in content["annotations"]:
            box["category_id"] = str(box["category_id"])

    splits = load(make_changed_coco(tmp_path, change))
    assert read(splits["train"]) == expected_rows("train") and read(splits["test"]) == expected_rows("test")


def test_detection_folder_logs_ignored_masks(tmp_path, capsys):
    folder = make_voc(tmp_path, "Annotations", "JPEGImages", lists=True)
    load(folder)
    assert "are ignored" not in capsys.readouterr().out
    save_images(folder / "SegmentationClass", "train")
    assert "objects" in load(folder)["train"].features
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "are ignored" in line]
    assert "boxes are used, masks in SegmentationClass are ignored; for segmentation, pass a folder" in line


@pytest.mark.parametrize("listed", [False, True])
def test_objects_column_in_memory_returns_labels(listed, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    categories = ClassLabel(names=["red", "blue"])
    rows = [
        {
            "photo": pixels,
            "objects": [{"bbox": box, "category": category} for category, *box in objects]
            if listed
            else {"bbox": [box for _, *box in objects], "category": [category for category, *_ in objects]},
        }
        for _, pixels, objects in make_scenes("train")
    ]
    record = {"bbox": List(Value("float32"), length=4), "category": categories}
    objects = List(record) if listed else {name: List(kind) for name, kind in record.items()}
    dataset = Dataset.from_list(rows, features=Features({"photo": Image(), "objects": objects}))
    splits = hftl.load_splits(hftl.DataConfig(source="python:x", validation_fraction=0.3), rows={"train": dataset})
    task = hftl.ObjectDetection(splits)
    assert task.head.labels == ("red", "blue")


def test_saved_task_maps_other_class_orders(tmp_path):
    from hftl.tasks.registry import restore

    by_name, by_number = load(make_voc(tmp_path / "voc"))["test"], load(make_coco(tmp_path / "coco"))["test"]
    task = restore("object_detection", {"inputs": {"column": "image"}, "target": TARGET})
    for rows in (by_name, by_number):
        column = task.target.reader(rows)
        classes = [column.read(row["objects"], task.target.classes, (48, 64)).classes.tolist() for row in rows]
        assert classes == [[1, 0], [], [1, 0]]  # blue and red, in drawing order
    rows = by_number.map(
        lambda row: {"objects": row["objects"] | {"category": [None] * len(row["objects"]["category"])}}
    )
    with pytest.raises(DataError, match="unknown category: box 0 has a category without a name"):
        column.read(rows[0]["objects"], task.target.classes, (48, 64))


TARGET = {"column": "objects", "names": ["red", "blue"]}


def make_changed_coco(folder, change, split="train"):
    """Writes a COCO folder and applies `change` to the annotations of `split`."""
    make_coco(folder)
    content = coco(split)
    change(content)
    (folder / f"{split}.coco.json").write_text(json.dumps(content))
    return folder


def set_box(number, box):
    def change(content):
        content["annotations"][number]["bbox"] = box

    return change


def set_size(width, height):
    return lambda content: content["images"][0].update(width=width, height=height)


INVALID = {
    "negative box size": set_box(0, [10, 10, -4, 5]),
    "empty box": set_box(0, [10, 10, 0, 5]),
    "box outside image": set_box(0, [64, 10, 5, 5]),
    "invalid box: box 0 ([nan": set_box(0, [float("nan"), 1, 5, 5]),
    "invalid box: box 0 ([1.0, 5.0])": set_box(0, [1, 5]),
    "unknown category": lambda content: content["annotations"][0].update(category_id=99),
    "normalized box: box 0 ([0.2, 0.3, 0.5, 0.7])": set_box(0, [0.2, 0.3, 0.5, 0.7]),
    "image size mismatch: boxes are for 640 x 480 pixels, the image has 64 x 48": set_size(640, 480),
    "the image has 64 x 48 (possibly rotated by EXIF orientation)": set_size(48, 64),
}


@pytest.mark.parametrize("reason", INVALID)
@pytest.mark.parametrize("split", ["train", "test"])
def test_invalid_objects_raise_with_row(reason, split, tmp_path):
    folder = make_changed_coco(tmp_path, INVALID[reason], split)
    with pytest.raises(DataError) as error:
        hftl.ObjectDetection(load(folder))
    assert f"{split} has 1 row(s)" in str(error.value) and "row 0 (" in str(error.value), error.value
    assert reason in str(error.value) and "--data.on_error skip" in str(error.value)


@pytest.mark.parametrize(
    "size", [{}, {"width": 0, "height": 0}, {"width": "64", "height": 48.0}, {"width": None, "height": 10**400}]
)
def test_coco_missing_image_size_is_accepted(size, tmp_path):
    def change(content):
        for image in content["images"]:
            del image["width"], image["height"]
            image.update(size)

    hftl.ObjectDetection(load(make_changed_coco(tmp_path, change)))


def test_voc_wrong_declared_size_raises_or_skips(tmp_path):
    file = make_voc(tmp_path) / "train/train2.xml"
    file.write_text(file.read_text().replace("<width>64<", "<width>640<"))
    splits = load(tmp_path)
    with pytest.raises(DataError, match="row 2 .*image size mismatch: boxes are for 640 x 48"):
        hftl.ObjectDetection(splits)
    lenient = replace(splits, lenient=True)
    assert {split: list(rows) for split, rows in hftl.ObjectDetection(lenient).invalid_rows(lenient).items()} == {
        "train": [2],
        "validation": [],
        "test": [],
    }


def test_clipped_boxes_are_logged_once_per_split(tmp_path, capsys):
    def corners(content):
        for box in content["annotations"]:
            x, y, width, height = box["bbox"]
            box["bbox"] = [30 + x, 25, 30 + x + width, 25 + height]
        content["annotations"][0]["bbox"] = [-2, 10, 20, 40]  # two pixels are not logged

    splits = load(make_changed_coco(tmp_path, corners))
    hftl.ObjectDetection(replace(splits, lenient=True))
    assert "exceed their images" not in capsys.readouterr().out
    hftl.ObjectDetection(splits)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "exceed their images" in line]
    assert said.startswith("data: train: clipped 9 of 10 boxes") and "not x0, y0, x1, y1" in said


def test_setup_run_skips_rows_with_invalid_objects(tiny_timm, tmp_path):
    folder = make_changed_coco(tmp_path / "data", INVALID["empty box"])
    data = hftl.DataConfig(source=str(folder), on_error="skip", max_skipped_fraction=0.5)
    model = hftl.ModelConfig(name=tiny_timm["test_resnet"], detector=hftl.DetectorConfig(d_model=32, num_queries=4))
    train = hftl.TrainConfig(batch_size_per_device=2)
    run = hftl.RunConfig(data, model, train=train, output_dir=str(tmp_path / "run"))
    run, splits, task = hftl.setup_run(run, hftl.ObjectDetection)
    assert len(splits["train"]) == COUNTS["train"] - 1
    (row,) = run.quarantine
    assert (row["split"], row["row"], row["column"]) == ("train", 0, "objects")
    assert row["reason"].startswith("empty box: box 0") and row["path"].endswith("train0.png")


def test_encode_clips_boxes_and_ignores_crowds(tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [-6, 40, 20, 20]
        content["annotations"][1]["iscrowd"] = 1

    splits = load(make_changed_coco(tmp_path, change))
    task = hftl.ObjectDetection(splits)
    from hftl.config.schema import AugmentConfig
    from hftl.preprocessing.joint_transforms import GeometryProcessor

    config = {"input_size": (3, 32, 64), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    rows = task.encode(splits["train"], GeometryProcessor(config, AugmentConfig()), None, None)
    batch = task.collate(rows.fetch([0, 1], 0))
    first, empty = batch["labels"]
    assert batch["size"].tolist() == [[48, 64], [48, 64]]
    assert first["true_boxes"][0].tolist() == [0, 40, 14, 48] and first["crowd"].tolist() == [False, True]
    assert first["boxes"].flatten().tolist() == pytest.approx([7 / 64, 44 / 48, 14 / 64, 8 / 48])  # without the crowd
    assert len(first["class_labels"]) == 1 and len(empty["boxes"]) == len(empty["true_boxes"]) == 0


def test_augmented_boxes_match_pixels(tmp_path):
    from hftl.config.schema import AugmentConfig
    from hftl.preprocessing.joint_transforms import GeometryProcessor

    splits = load(make_coco(tmp_path))
    task = hftl.ObjectDetection(splits)
    config = {"input_size": (3, 96, 128), "interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    rows = task.encode(splits["train"], GeometryProcessor(config, AugmentConfig(color_jitter=0)), 0, None)
    checked = 0
    for epoch in range(4):
        for example in rows.fetch(range(6), epoch):
            label = task.collate([example])["labels"][0]
            for index, (x, y, w, h) in zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True):
                if index == 0 and len(label["boxes"]) == 2:
                    continue  # red covers blue
                pixel = example["pixel_values"][:, int(y * 96), int(x * 128)]
                assert pixel.argmax() == (2 if index == 0 else 0) and w * 128 > 1 and h * 96 > 1
                checked += 1
    assert checked > 8


def remove(*keys):
    def change(content):
        for key in keys:
            del content[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("categories"), "categories must be a list of objects"),
        (lambda content: content["annotations"][0].update(image_id=5), "image_id 5, which is not in the list"),
        (lambda content: content["images"][1].update(id=40), "image id 40 more than once"),
        (lambda content: content["categories"][0].update(name="red"), "has the name red for more than one category"),
        (lambda content: [image.update(file_name="gone.png") for image in content["images"]], "are in none of"),
        (lambda content: content["images"][2].update(file_name="gone.png"), "1 unreadable image(s): row 2"),
        (
            lambda content: content["images"][2].update(file_name="../../../etc/passwd.png"),
            "is outside the data folder",
        ),
        (lambda content: content["annotations"].clear(), "train has no box"),
    ],
)
def test_damaged_coco_raises(change, message, tmp_path):
    with pytest.raises(HftlError) as error:
        hftl.ObjectDetection(load(make_changed_coco(tmp_path, change)))
    assert message in str(error.value), error.value


def test_detection_rejects_auto_augment(tmp_path):
    data = hftl.DataConfig(source=str(make_coco(tmp_path)), augment=hftl.AugmentConfig(auto_augment="original"))
    with pytest.raises(DataError, match=r"auto_augment.*does not transform masks and boxes"):
        hftl.ObjectDetection(hftl.load_splits(data))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_missing_objects_column_raises_except_test(split, tmp_path, capsys):
    splits = load(make_coco(tmp_path))
    incomplete = replace(splits, sets=splits.sets | {split: splits[split].remove_columns("objects")})
    if split == "validation":
        with pytest.raises(DataError, match="validation has no column 'objects'.*split off train"):
            hftl.ObjectDetection(incomplete)
        return
    task = hftl.ObjectDetection(incomplete)
    assert "test has no column 'objects'; its rows are predicted" in capsys.readouterr().out
    assert set(task.invalid_rows(incomplete)) >= {"train", "validation"}


def test_category_missing_in_train_raises(tmp_path):
    def change(content):
        content["categories"].append({"id": 50, "name": "green"})
        content["annotations"][1]["category_id"] = 50

    with pytest.raises(DataError, match="test has 1 row.*unknown category: box 1 is 'green'"):
        hftl.ObjectDetection(load(make_changed_coco(tmp_path, change, "test")))


def test_two_coco_files_for_one_split_raise(tmp_path):
    make_coco(tmp_path)
    shutil.copy(tmp_path / "train.coco.json", tmp_path / "train2.json")
    with pytest.raises(DataError, match="could each be train"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "declares a document type"),
        ("<annotation><object><name>red</name></object></annotation>", "no name or no bndbox"),
    ],
)
def test_damaged_voc_raises(text, message, tmp_path):
    folder = make_voc(tmp_path)
    (folder / "train/train0.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_json_table_is_not_read_as_coco(tmp_path):
    save_images(tmp_path / "images", "train")
    rows = [{"image": f"images/{name}", "label": "a b"[:1]} for name, *_ in make_scenes("train")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert "objects" not in load(tmp_path)["train"].features
    with pytest.raises(DataError, match="no column of objects found"):
        hftl.ObjectDetection(load(tmp_path))


@pytest.mark.real
def test_bccd_voc_reports_two_empty_boxes(shared, tmp_path):
    source = shared / "image/bccd_detection"
    empty = []
    for split in ("train", "val", "test"):
        for file in sorted((source / "voc" / split).glob("*.xml")):
            text = file.read_text()
            corners = [text.split(f"<{name}>")[1:] for name in ("xmin", "xmax", "ymin", "ymax")]
            values = [[float(text.partition("<")[0]) for text in texts] for texts in corners]
            if any(x0 >= x1 or y0 >= y1 for x0, x1, y0, y1 in zip(*values, strict=True)):
                empty.append((split, file))
    assert len(empty) == 2
    sample = {split: [file for where, file in empty if where == split] for split in ("train", "val", "test")}
    train_files = sorted((source / "voc/train").glob("*.xml"))[:4]
    sample["train"] += [file for file in train_files if file not in sample["train"]]
    for split, files in sample.items():
        for file in files:
            for folder in ("voc", "images"):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "voc" / split)
            shutil.copy(source / "images" / split / f"{file.stem}.jpg", tmp_path / "images" / split)
    with pytest.raises(DataError) as error:
        hftl.ObjectDetection(load(tmp_path, validation_fraction=0))
    assert str(error.value).count("empty box") == 2
