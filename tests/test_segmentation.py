"""Semantic segmentation: mask validation, metrics against torchmetrics, models reloaded with transformers."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_undrawn, with_data
from launch import ENV
from PIL import Image
from torch.nn import functional

import hftl
from hftl.data.source import load_splits
from hftl.errors import ConfigError, DataError, ModelError
from hftl.inference.batch_inference import evaluate_saved, predict_to_file
from hftl.models.segmentation_model import decoded_levels
from hftl.reporting import write_report
from hftl.run.testing import check_task
from hftl.tasks.targets.segmentation.masks import find_classes
from hftl.tasks.targets.segmentation.metrics import SegmentationMetrics
from hftl.tasks.targets.segmentation.target import IGNORED, SegmentationTarget

NAMES = ["ground", "void", "left", "right"]
COUNTS = {"train": 10, "val": 4, "test": 5}


def scene(rng, number):
    """Returns a noisy image of 30 x 44 pixels with two colored boxes on green, and its mask with a void first line."""
    mask = np.zeros((30, 44), np.uint8)
    for box, value in enumerate((2, 3)):
        top, left = rng.integers(1, 12), rng.integers(0, 8) + 22 * box
        mask[top : top + 14, left : left + 12] = value
    mask[0] = 1
    pixels = rng.integers(0, 80, (30, 44, 3), dtype=np.uint8)
    for value, channel in ((0, 1), (2, 0), (3, 2)):
        pixels[mask == value, channel] += 160
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Folders SPLIT/images and SPLIT/masks, and classes.json with a void class between the others."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            image, mask = scene(rng, number)
            image.save(folder / split / "images" / f"{number:02d}.png")
            mask.save(folder / split / "masks" / f"{number:02d}.png")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


def make_run(scenes, nets, folder, net="test_resnet", method="full", **train):
    options = {"num_epochs": 1, "lr": 1e-3, "head_lr": 1e-2, "batch_size_per_device": 4, "trackers": []} | train
    return hftl.RunConfig(
        data=hftl.DataConfig(source=str(scenes)),
        model=hftl.ModelConfig(name=nets[net], image_size=[32, 48], decoder_channels=8),
        adapt=hftl.AdaptConfig(method=method),
        train=hftl.TrainConfig(**options),
        output_dir=str(folder),
    )


@pytest.fixture
def scene_run(scenes, tiny_timm, tmp_path):
    """Returns a function that creates the configuration of a short run."""
    return lambda *net_and_method, **train: make_run(scenes, tiny_timm, tmp_path / "run", *net_and_method, **train)


@pytest.fixture(scope="module")
def trained(scenes, tiny_timm, tmp_path_factory):
    """Run folder and metrics of a run that is long enough to learn the boxes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = make_run(
        scenes, tiny_timm, folder, num_epochs=24, lr=3e-3, head_lr=1e-2, freeze_backbone_ratio=0.0, eval_steps=24
    )
    metrics = run_undrawn("semantic_segmentation", with_data(run, augment=hftl.AugmentConfig(0.8, 0, 0)))
    return folder, metrics


@pytest.mark.parametrize("net", ["test_resnet", pytest.param("test_convnext", marks=pytest.mark.slow)])
def test_check_task_accepts_semantic_segmentation(net, scene_run):
    run, splits, task = hftl.setup_run(scene_run(net), hftl.SemanticSegmentation)
    assert task.head.labels == ("ground", "left", "right") and task.target.classes.values == (0, 2, 3)
    check_task(task, splits, run)


CLEAN = """
import base64, io, json, sys, numpy as np, torch, pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file
import transformers
run, images = sys.argv[1:]
place = run + "/model"
net = transformers.AutoModelForSemanticSegmentation.from_pretrained(place).eval()
sample = load_file(run + "/sample.safetensors")
with torch.no_grad():
    torch.testing.assert_close(net(sample["inputs.pixel_values"]).logits, sample["logits"], atol=1e-4, rtol=1e-4)
rows = [row for row in pq.read_table(run + "/predictions.parquet").to_pylist() if row["split"] == "test"]
segment = transformers.pipeline("image-segmentation", place)
values = {"ground": 0, "left": 2, "right": 3}
for row in rows:
    predicted = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["mask_png"]))))
    expected = np.full(predicted.shape, 255)
    for segmented in segment(f"{images}/{row['row']:02d}.png"):
        expected[np.asarray(segmented["mask"]) > 0] = values[segmented["label"]]
    assert (predicted == expected).mean() > 0.995, (row["row"], (predicted == expected).mean())
print("equal", len(rows))
"""


def decode_mask(row):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(row["mask_png"]))))


def test_saved_segmentation_model_loads_without_hftl(trained, scenes, run_without_hftl):
    folder, metrics = trained
    assert metrics["test/mean_iou"] > 0.5 and metrics["test/iou/left"] > 0.3
    assert "equal 5" in run_without_hftl(CLEAN, str(folder), str(scenes / "test" / "images"))
    card = (folder / "model/README.md").read_text()
    assert "library_name: transformers" in card and "pipeline_tag: image-segmentation" in card
    assert 'pipeline("image-segmentation"' in card


def test_predicted_masks_preserve_size_and_mask_values(trained, scenes, tmp_path, capsys):
    folder, metrics = trained
    images = scenes / "test" / "images"
    (row,) = hftl.load(folder).predict(str(images / "00.png"))
    mask, true = decode_mask(row), np.asarray(Image.open(scenes / "test" / "masks" / "00.png"))
    assert mask.shape == true.shape and set(np.unique(mask)) <= {0, 2, 3}
    assert (mask == true)[true != 1].mean() > 0.7
    assert row["shares"] == pytest.approx([(mask == value).mean() for value in (0, 2, 3)])

    assert evaluate_saved(str(folder))["test/mean_iou"] == metrics["test/mean_iou"]
    predict_to_file(str(folder), str(images), output=str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.mask.png"))) == 5
    listed = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / listed[0]["mask_png"])), mask)
    capsys.readouterr()
    predict_to_file(str(folder), str(images / "00.png"))
    assert "mask_png" not in capsys.readouterr().out


def test_report_contains_images_with_masks(trained):
    folder, _ = trained
    page = write_report(folder).read_text()
    assert page.count("data:image/png;base64,") == 2 * COUNTS["test"] and "images of test" in page


def test_evaluate_on_two_processes_matches_one(trained, forks, tmp_path):
    """Five rows in batches of two, so the processes have different numbers of rows."""
    folder, metrics = trained
    code = "import sys; from hftl.cli.main import main; main(sys.argv[1:])"
    arguments = ["evaluate", str(folder), "--batch_size", "2", "--output", str(tmp_path / "two.parquet")]
    statuses, output = forks.command(["python", "-c", code, *arguments], tmp_path / "logs", 280, 2, **ENV)
    assert statuses == [0, 0], output[-3000:]
    for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "iou/left", "loss"):
        assert f"{metrics[f'test/{name}']:.4f}" in output, name
    distributed = pq.read_table(tmp_path / "two.parquet").to_pylist()
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == "test"]
    assert [row["mask_png"] for row in distributed] == [row["mask_png"] for row in rows]


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_loaded_frozen_or_lora_run_matches_its_metrics(method, scene_run, scenes, capsys):
    run = scene_run("test_resnet", method)
    metrics = run_undrawn("semantic_segmentation", run)
    output = capsys.readouterr().out
    assert method != "frozen" or "the backbone runs in every epoch" in output
    folder = "adapter" if method == "lora" else "model"
    predictor = hftl.load(f"{run.output_dir}/{folder}")
    rows = predictor.predict([str(file) for file in sorted((scenes / "test" / "images").iterdir())])
    correct = []
    for row, file in zip(rows, sorted((scenes / "test" / "masks").iterdir()), strict=True):
        true = np.asarray(Image.open(file))
        correct.append((decode_mask(row) == true)[true != 1])
    assert np.concatenate(correct).mean() == pytest.approx(metrics["test/pixel_accuracy"], abs=1e-6)


def test_batch_of_one_image_returns_finite_gradients(scene_run):
    """Batch norm rejects one value per channel, which the published 1 x 1 pooling of UPerNet produces."""
    run, splits, task = hftl.setup_run(scene_run(), hftl.SemanticSegmentation)
    model = hftl.build_model(run, task.head).train()
    batch = task.collate(task.encode(splits["train"], model.processor, 0, None).fetch([0], 0))
    task.loss(model(batch["inputs"]), batch).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.head_parameters())


# Metrics and loss


def random_case(seed, rows, classes, present):
    generator = torch.Generator().manual_seed(seed)
    outputs = {"logits": torch.randn(rows, classes, 9, 11, generator=generator)}
    sizes = [(9, 11), (18, 25), (7, 8)]
    masks = [torch.randint(-1, present, sizes[row % 3], generator=generator).to(torch.int16) for row in range(rows)]
    return outputs, masks


@pytest.mark.parametrize(("rows", "classes", "present"), [(6, 4, 4), (5, 7, 3), (1, 2, 2)])
def test_segmentation_metrics_match_torchmetrics(rows, classes, present):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    outputs, masks = random_case(rows, rows, classes, present)
    outputs["logits"][:, -1] -= 9 * (present < classes)  # the last class is neither in masks nor predicted
    references = {
        "mean_iou": MulticlassJaccardIndex(classes, ignore_index=IGNORED),
        "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
        "mean_accuracy": MulticlassAccuracy(classes, ignore_index=IGNORED),
    }
    per_class = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORED)
    metrics = [SegmentationMetrics([str(number) for number in range(classes)], IGNORED) for _ in range(3)]
    for row, (logits, mask) in enumerate(zip(outputs["logits"], masks, strict=True)):
        resized = functional.interpolate(logits[None], mask.shape, mode="bilinear", align_corners=False)
        for metric in (*references.values(), per_class):
            metric.update(resized, mask[None].long())
        metrics[row % 3].update({"logits": logits[None]}, {"labels": [mask]})
    metrics[0].merge(metrics[1])
    metrics[0].merge(metrics[2])
    scores = metrics[0].compute()
    for name, reference in references.items():
        assert scores[name] == pytest.approx(float(reference.compute()), abs=1e-6), name
    expected = per_class.compute().tolist()
    occurs = metrics[0].confusion.sum(0) + metrics[0].confusion.sum(1) > 0
    assert {name: value for name, value in scores.items() if name.startswith("iou/")} == pytest.approx(
        {f"iou/{n}": value for n, value in enumerate(expected) if occurs[n]}
    )
    if present < classes:
        assert f"iou/{classes - 1}" not in scores


def test_segmentation_loss_averages_labeled_pixels():
    target = SegmentationTarget("mask", ["a", "b", "c"], [0, 1, 2], [])
    outputs, masks = random_case(3, 3, 3, 3)
    masks[1] = torch.full((9, 11), IGNORED, dtype=torch.int16)
    outputs["logits"].requires_grad_()
    losses = target.loss(outputs, masks)
    for row in (0, 2):
        resized = functional.interpolate(outputs["logits"][row][None], masks[row].shape, mode="bilinear")
        expected = functional.cross_entropy(resized, masks[row][None].long(), ignore_index=IGNORED)
        assert losses[row].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses[1].item() == 0
    losses.sum().backward()
    assert torch.isfinite(outputs["logits"].grad).all() and not outputs["logits"].grad[1].any()
    with_auxiliary = target.loss(outputs | {"auxiliary_logits": outputs["logits"]}, masks)
    assert torch.allclose(with_auxiliary, 1.4 * losses)


# Data


def copy_pairs(scenes, image_folder, mask_folder, ending="", mode="image"):
    for kind, folder in (("images", image_folder), ("masks", mask_folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for file in (scenes / "val" / kind).iterdir():
            suffix = ending if kind == "masks" else ""
            (folder / f"{file.stem}{suffix}.png").write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("images", "masks", "ending"),
    [
        ("train", "trainannot", ""),
        ("train", "train_masks", "_mask"),
        ("images", "masks", ""),
        ("images/train", "annotations/train", ""),
        ("train/images", "train/labels", "_L"),
    ],
)
def test_load_splits_pairs_images_and_masks_by_name(images, masks, ending, scenes, tmp_path):
    copy_pairs(scenes, tmp_path / images, tmp_path / masks, ending)
    (tmp_path / masks / "stray.png").write_bytes((scenes / "val/masks/00.png").read_bytes())
    splits = load_splits(hftl.DataConfig(source=str(tmp_path), validation_fraction=0))
    reloaded = load_splits(hftl.DataConfig(source=str(tmp_path), validation_fraction=0))
    assert splits["train"]._fingerprint == reloaded["train"]._fingerprint
    for number, row in enumerate(splits["train"]):
        assert np.array_equal(row["image"], Image.open(scenes / f"val/images/{number:02d}.png"))
        assert np.array_equal(row["mask"], Image.open(scenes / f"val/masks/{number:02d}.png"))
    assert len(splits["train"]) == 4


def test_load_splits_skips_annotation_folder_without_masks(scenes, tmp_path):
    copy_pairs(scenes, tmp_path / "JPEGImages", tmp_path / "SegmentationClass")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "notes.txt").write_text("boxes elsewhere")
    assert len(load_splits(hftl.DataConfig(source=str(tmp_path), validation_fraction=0))["train"]) == 4


@pytest.mark.parametrize(
    ("images", "masks", "misnamed", "message"),
    [
        ("{}/images", "{}/masks", "val/maks", "split 'val' has no masks"),
        ("images/{}", "masks/{}", "masks/old", "split 'val' has no masks"),
        ("{}", "{}_masks", "valmsk", "split 'val' has no masks"),
        ("images/{}", "masks/{}", None, "split 'val' has no images"),
    ],
)
def test_load_splits_logs_incomplete_split(images, masks, misnamed, message, scenes, tmp_path, capsys):
    for split in ("train", "val"):
        copy_pairs(scenes, tmp_path / images.format(split), tmp_path / masks.format(split))
    folder = tmp_path / (masks if misnamed else images).format("val")
    folder.rename(tmp_path / (misnamed or "images/old"))
    splits = load_splits(hftl.DataConfig(source=str(tmp_path), validation_fraction=0))
    assert set(splits) == {"train"}
    assert f"data: {message} and is ignored" in capsys.readouterr().out


@pytest.mark.parametrize(("folder", "name"), [("images", "00.jpg"), ("masks", "00.gif"), ("masks", "00_mask.png")])
def test_load_splits_rejects_two_files_for_one_image(folder, name, scenes, tmp_path):
    copy_pairs(scenes, tmp_path / "images", tmp_path / "masks")
    (tmp_path / folder / name).write_bytes((tmp_path / folder / "01.png").read_bytes())
    with pytest.raises(DataError, match="has several files for one image: ") as error:
        load_splits(hftl.DataConfig(source=str(tmp_path)))
    assert name in str(error.value) and "00.png" in str(error.value)


def test_load_splits_without_matching_names_raises(scenes, tmp_path):
    copy_pairs(scenes, tmp_path / "images", tmp_path / "masks", "zzz")
    with pytest.raises(DataError, match=r"no mask in .*masks' has the name of an image.*00zzz"):
        load_splits(hftl.DataConfig(source=str(tmp_path)))


def test_two_image_columns_return_image_and_mask_column(scenes, tmp_path):
    copy_pairs(scenes, tmp_path / "a", tmp_path / "b")
    lines = [f"a/{number:02d}.png,b/{number:02d}.png" for number in range(4)]
    (tmp_path / "train.csv").write_text("\n".join(["photo_file,annotation", *lines]))
    splits = load_splits(hftl.DataConfig(source=str(tmp_path), validation_fraction=0))
    task = hftl.SemanticSegmentation(splits)
    assert (task.inputs.column, task.target.column) == ("photo_file", "annotation")
    assert task.target.names == ["0", "1", "2", "3"]  # without a file of names the values are the names
    renamed = {"train": splits["train"].rename_columns({"photo_file": "one", "annotation": "other"})}
    with pytest.raises(DataError, match=r"are ambiguous\. .*one \(Image\), other \(Image\)"):
        hftl.SemanticSegmentation(replace(splits, sets=renamed))
    named = replace(splits, sets=renamed, config=replace(splits.config, label_column="other"))
    assert hftl.SemanticSegmentation(named).inputs.column == "one"


def load_without_masks(scenes, folder, split):
    """Loads tables whose `split` has no masks; the test table is read before the train table."""
    copy_pairs(scenes, folder / "a", folder / "b")
    for name in ("train", "val", "test"):
        rows = [f"a/{number:02d}.png,b/{number:02d}.png" for number in range(4)]
        rows = ["image,mask", *rows] if name != split else ["image", *(row.partition(",")[0] for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(rows))
    return load_splits(hftl.DataConfig(source=str(folder)))


def test_test_split_without_masks_is_accepted_and_logged(scenes, tmp_path, capsys):
    splits = load_without_masks(scenes, tmp_path, "test")
    task = hftl.SemanticSegmentation(splits)
    assert task.target.column == "mask" and "test has no column 'mask'" in capsys.readouterr().out
    assert task.invalid_rows(splits)["train"] == {} and "test" not in task.target.invalid_rows(splits)


def test_run_with_unlabeled_test_split_writes_predictions(scenes, tiny_timm, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    load_without_masks(scenes, folder, "test")
    metrics = run_undrawn("semantic_segmentation", make_run(folder, tiny_timm, tmp_path / "run", max_steps=1))
    assert write_report(tmp_path / "run").is_file()
    assert "validation/mean_iou" in metrics and "test/mean_iou" not in metrics
    rows = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert sum(row["split"] == "test" and bool(row["mask_png"]) for row in rows) == 4


def test_path_column_empty_in_first_table_returns_images(scenes, tmp_path):
    load_without_masks(scenes, tmp_path, "test")
    (tmp_path / "test.csv").write_text("image,mask\na/00.png,\n")
    features = load_splits(hftl.DataConfig(source=str(tmp_path)))["train"].features
    assert type(features["mask"]).__name__ == "Image"


def test_validation_split_without_masks_raises(scenes, tmp_path):
    with pytest.raises(DataError, match="validation has no column 'mask'.*Add it"):
        hftl.SemanticSegmentation(load_without_masks(scenes, tmp_path, "val"))


def test_find_classes_detects_void_by_name_value_or_setting():
    assert find_classes([0, 1, 2], ["sky", "Unlabelled(void)", "road"], None).void == (1, 255)
    assert find_classes([0, 1, 255], None, None).values == (0, 1)
    assert find_classes([0, 1, 9], None, 9).values == (0, 1)
    assert find_classes([0, 255], None, -1).values == (0, 255)
    assert find_classes([0, 1], ["void deck", "road"], -1).names == ("void deck", "road")


def replace_masks(folder, masks):
    """Replaces the first masks of a folder; None deletes the mask."""
    for number, mask in enumerate(masks):
        file = folder / f"{number:02d}.png"
        file.unlink()
        if mask is not None:
            mask.save(file)


INVALID_MASKS = [
    (Image.new("L", (43, 30)), "mask size differs from image size: 43 x 30 and 44 x 30"),
    (Image.new("RGB", (44, 30)), "its mode is RGB"),
    (Image.new("L", (44, 30), 77), "mask value without a class: 77"),
    (None, "no mask"),
]


def test_invalid_masks_raise_together_or_are_skipped(scenes, scene_run, tmp_path):
    copy_pairs(scenes, tmp_path / "d/train/images", tmp_path / "d/train/masks")
    for number in range(4, 10):
        for kind in ("images", "masks"):
            (tmp_path / f"d/train/{kind}/{number:02d}.png").write_bytes(
                (scenes / f"train/{kind}/{number:02d}.png").read_bytes()
            )
    (tmp_path / "d/classes.json").write_text(json.dumps(NAMES))
    replace_masks(tmp_path / "d/train/masks", [mask for mask, _ in INVALID_MASKS])
    run = with_data(scene_run(), source=str(tmp_path / "d"), validation_fraction=0)
    with pytest.raises(ConfigError) as error:
        hftl.setup_run(run, hftl.SemanticSegmentation)
    message = str(error.value)
    for number, (_, reason) in enumerate(INVALID_MASKS):
        assert f"row {number} " in message or f"row {number}:" in message, message
        assert reason in message, message
    assert "data.ignore_index" in message
    run, splits, _ = hftl.setup_run(
        with_data(run, on_error="skip", max_skipped_fraction=0.5), hftl.SemanticSegmentation
    )
    assert len(splits["train"]) == 6 and [row["row"] for row in run.quarantine] == [0, 1, 2, 3]


def test_decode_indices_reads_palette_and_16_bit_masks(tmp_path):
    from hftl.data.image_decoding import decode_indices

    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(values, "P")
    palette.putpalette([200, 10, 30] * 256)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values.astype(np.uint16) * 1000).save(tmp_path / "16bit.png")
    decoded = [decode_indices({"path": str(tmp_path / name)}, 10**6) for name in ("palette.png", "16bit.png")]
    assert np.array_equal(decoded[0], values) and np.array_equal(decoded[1], values.astype(int) * 1000)


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "MPO", "save_all": True}])
def test_decode_indices_rejects_jpeg_mask(options, tmp_path):
    from hftl.data.image_decoding import decode_indices

    Image.new("L", (8, 8), 3).save(tmp_path / "mask.jpg", **options)
    with pytest.raises(DataError, match="not a mask: JPEG changes class indices.*PNG"):
        decode_indices({"path": str(tmp_path / "mask.jpg")}, 10**6)


def test_masks_with_one_class_raise_and_name_ignore_index(scenes, scene_run, tmp_path):
    copy_pairs(scenes, tmp_path / "images", tmp_path / "masks")
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 1).astype(np.uint8) * 255).save(file)
    run = with_data(scene_run(), source=str(tmp_path), validation_fraction=0)
    with pytest.raises(ConfigError, match=r"value\(s\) 0, 255, void: 255.*ignore_index -1"):
        hftl.setup_run(run, hftl.SemanticSegmentation)
    _, _, task = hftl.setup_run(with_data(run, ignore_index=-1), hftl.SemanticSegmentation)
    assert task.target.names == ["0", "255"]


def test_loss_and_metrics_ignore_void_mask(scenes, scene_run, tmp_path, capsys):
    copy_pairs(scenes, tmp_path / "images", tmp_path / "masks")
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    Image.new("L", (44, 30), 1).save(tmp_path / "masks/01.png")
    run = with_data(scene_run(), source=str(tmp_path), validation_fraction=0)
    run, splits, task = hftl.setup_run(run, hftl.SemanticSegmentation)
    assert "1 mask(s) contain only void pixels" in capsys.readouterr().out
    model = hftl.build_model(run, task.head).eval()
    batch = task.collate(task.encode(splits["train"], model.processor, None, None).fetch([1], 0))
    with torch.no_grad():
        outputs = model(batch["inputs"])
    assert task.loss(outputs, batch).tolist() == [0]
    (metric,) = task.metrics()
    metric.update(outputs, batch)
    assert not metric.confusion.any() and metric.compute()["mean_iou"] != metric.compute()["mean_iou"]


# Models


def test_decoded_levels_with_many_levels_returns_four():
    assert decoded_levels([2, 4, 8, 16, 32]) == [1, 2, 3, 4]
    assert decoded_levels([4, 8, 16, 32]) == [0, 1, 2, 3]
    assert decoded_levels([16] * 12) == [2, 5, 8, 11]
    assert decoded_levels([8, 16]) == [0, 1]


def test_segmentation_rejects_unsupported_model_settings(scene_run):
    with pytest.raises(ConfigError, match="img_size.*TimmBackbone does not support"):
        hftl.setup_run(scene_run("test_vit"), hftl.SemanticSegmentation)
    run = scene_run()
    with pytest.raises(ConfigError, match="model.dropout"):
        hftl.setup_run(replace(run, model=replace(run.model, dropout=0.1)), hftl.SemanticSegmentation)
    with pytest.raises(ConfigError, match="auto_augment"):
        policy = hftl.AugmentConfig(auto_augment="rand-m9")
        hftl.setup_run(with_data(run, augment=policy), hftl.SemanticSegmentation)
    fixed = replace(
        run, model=hftl.ModelConfig(name="vit_tiny_patch16_224", pretrained=False, image_size=64, decoder_channels=8)
    )
    run, _, task = hftl.setup_run(scene_run(), hftl.SemanticSegmentation)
    with pytest.raises(ModelError, match="fixed input size 224 x 224 pixels"):
        hftl.build_model(fixed, task.head)


def test_segmentation_backbone_features_match_timm(scene_run, tiny_timm):
    import timm

    run, _, task = hftl.setup_run(scene_run(), hftl.SemanticSegmentation)
    model = hftl.build_model(run, task.head).eval()
    features = timm.create_model(tiny_timm["test_resnet"], pretrained=True, features_only=True).eval()
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        maps = model.net.backbone(pixels).feature_maps
        for actual, expected in zip(maps, features(pixels)[1:], strict=True):
            torch.testing.assert_close(actual, expected)
