"""Quarantine of invalid rows (`data.on_error`); the reference is the same data without the invalid rows."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, load_recipe, with_data
from image_samples import INVALID, VALID

import hftl
from hftl.cli.main import main
from hftl.data.source import load_splits
from hftl.data.validation import FILE, BadRow
from hftl.errors import ConfigError, DataError
from hftl.loading.loader import Share, eval_batches, make_loader
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows

INVALID_FILES = {
    "train/red/03.png": ("truncated png", "truncated image"),
    "train/blue/00.png": ("text", "not an image"),
    "train/green/11.png": ("zero bytes", "empty file"),
    "val/blue/01.png": ("header bomb", "too large"),
    "test/green/01.png": ("float tiff", "undefined white point"),
    "test/green/02.png": ("truncated jpeg", "truncated image"),
}


@pytest.fixture
def dirty(images, tmp_path) -> Path:
    """Image folder with invalid files in every split."""
    folder = shutil.copytree(images, tmp_path / "dirty")
    for name, (kind, _) in INVALID_FILES.items():
        (folder / name).write_bytes(INVALID[kind]()[0])
    return folder


@pytest.fixture
def clean(images, tmp_path) -> Path:
    """The same folder without the invalid files."""
    folder = shutil.copytree(images, tmp_path / "clean")
    for name in INVALID_FILES:
        (folder / name).unlink()
    return folder


def skipping(run, source, **changes):
    return with_data(run, source=str(source), on_error="skip", **{"max_skipped_fraction": 0.5} | changes)


def rows_of(splits, folder):
    from datasets import Image

    paths_and_labels = {}
    for split, rows in splits.items():
        table = rows.cast_column("image", Image(decode=False))[:]
        paths = [str(Path(image["path"]).relative_to(folder)) for image in table["image"]]
        paths_and_labels[split] = list(zip(paths, table["label"], strict=True))
    return paths_and_labels


def read_records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / FILE).read_text().splitlines()]


def setup_problems(run, task=hftl.ImageClassification) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        hftl.setup_run(run, task)
    return raised.value.problems


# Images


@pytest.mark.parametrize("subfolder", ["", "train"], ids=["validation split", "split off train"])
@pytest.mark.parametrize("limit", [None, 5])
def test_skip_matches_source_without_invalid_rows(subfolder, limit, image_run, dirty, clean):
    splits, expected = (
        hftl.setup_run(
            skipping(image_run(), folder / subfolder, max_train_samples_per_class=limit, validation_fraction=0.2),
            hftl.ImageClassification,
        )[1]
        for folder in (dirty, clean)
    )
    rows_by_split = rows_of(splits, dirty)
    assert rows_by_split == rows_of(expected, clean) and set(rows_by_split) >= {"train", "validation"}
    assert not set(INVALID_FILES) & {path for rows in rows_by_split.values() for path, _ in rows}


def test_quarantine_lists_rows_with_source_position(image_run, dirty, capsys):
    run, _, _ = hftl.setup_run(skipping(image_run(), dirty), hftl.ImageClassification)
    printed = capsys.readouterr().out
    assert "data: train: skipped 3 of 36 rows (1 x " in printed and f"listed in {run.output_dir}/{FILE}" in printed
    assert "data: test: skipped 2 of 10 rows (1 x undefined white point, 1 x truncated image)" in printed
    assert not Path(run.output_dir, FILE).exists(), "the run folder is validated first"
    hftl.create_accelerator(run)
    source_rows = rows_of(load_splits(run.data), dirty)
    records = read_records(run.output_dir)
    assert len(records) == len(INVALID_FILES)
    for record in records:
        assert set(record) == {"split", "row", "column", "value", "path", "reason"}
        name = str(Path(record["path"]).relative_to(dirty))
        assert source_rows[record["split"]][record["row"]][0] == name
        assert record["reason"].startswith(INVALID_FILES[name][1])
    assert not list(Path(run.output_dir).glob("*.partial"))


def test_metrics_match_training_without_invalid_rows(image_run, dirty, clean, tmp_path):
    results = []
    for folder in (dirty, clean):
        run = replace(skipping(image_run(), folder), output_dir=str(tmp_path / f"run of {folder.name}"))
        run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        hftl.fit(accelerator, model, task, splits, run)
        file = Path(run.output_dir, "predictions.parquet")
        metrics = hftl.evaluate(accelerator, model, task, splits, run, file)
        results.append((metrics, pq.read_table(file), Path(run.output_dir, FILE).exists()))
    (metrics, predictions, has_file), (expected_metrics, expected_predictions, clean_has_file) = results
    assert metrics == expected_metrics and predictions.equals(expected_predictions)
    assert has_file and not clean_has_file


@pytest.mark.slow
def test_later_commands_use_quarantine(image_run, dirty, clean, tmp_path, capsys):
    run = skipping(image_run(), dirty)
    metrics, folder = load_recipe("image_classification").main(run), Path(run.output_dir)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["left_out"] == {"train": 3, "validation": 1, "test": 2}
    assert facts["rows"] == {"train": 33, "validation": 8, "test": 8}
    assert "skipped: train 3, validation 1, test 2" in (folder / "model/README.md").read_text()
    assert not list((folder / "model").rglob(FILE)), "the pushed folder has no values of the data"

    # evaluation on the training data: the same rows and metrics
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) in (0, None)
    assert f"{metrics['test/accuracy']:.4f}"[:6] in capsys.readouterr().out
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) in (0, None)
    assert "data cannot be" not in (folder / "report.html").read_text().lower()

    # prediction uses the same decoding; errors include the image
    model = hftl.load(folder)
    deep = tmp_path / "16_bit.jpg"
    deep.write_bytes(VALID["16-bit png"]()[0])
    examples = model.encode(model._dataset([deep])).fetch([0], 0)
    gray = tmp_path / "gray.png"
    gray.write_bytes(VALID["gray png"]()[0])
    assert np.array_equal(
        examples[0]["pixel_values"], model.encode(model._dataset([gray])).fetch([0], 0)[0]["pixel_values"]
    )
    with pytest.raises(DataError, match=r"row 1: the image \(.*green/01.png\) cannot be decoded: undefined white"):
        model.predict([str(deep), str(dirty / "test/green/01.png")])

    # a later run without invalid rows removes the old file
    clean_run = replace(skipping(image_run(), clean), output_dir=str(folder), overwrite=True)
    hftl.create_accelerator(hftl.setup_run(clean_run, hftl.ImageClassification)[0])
    assert not (folder / FILE).exists()


def test_max_skipped_fraction_raises_with_counts_and_reasons(image_run, dirty):
    (test,) = setup_problems(skipping(image_run(), dirty, max_skipped_fraction=0.12))
    assert "2 of 10 rows of test are invalid" in test
    train, validation, test = setup_problems(skipping(image_run(), dirty, max_skipped_fraction=0.0))
    assert "3 of 36 rows of train" in train and "1 x truncated image" in train and "1 x not an image" in train
    assert f"row 0 ({dirty}/train/blue/00.png): not an image" in train and "data.max_skipped_fraction" in train
    assert "1 of 9 rows of validation" in validation and "2 of 10 rows of test" in test
    hftl.setup_run(
        skipping(image_run(), dirty, max_skipped_fraction=0.2), hftl.ImageClassification
    )  # 2 of 10 rows are within the limit


def test_split_without_valid_rows_raises(image_run, dirty):
    for file in (dirty / "test").rglob("*.png"):
        file.write_bytes(b"")
    (problem,) = setup_problems(skipping(image_run(), dirty, max_skipped_fraction=1.0))
    assert "10 of 10 rows of test are invalid (10 x empty file)" in problem


def test_skip_drops_class_without_valid_training_images(image_run, dirty, images):
    for file in (dirty / "train/green").glob("*.png"):
        file.write_bytes(b"")
    run, splits, task = hftl.setup_run(skipping(image_run(), dirty), hftl.ImageClassification)
    assert {label for rows in splits.values() for label in rows["label"]} == {0, 2}
    reasons = [row["reason"] for row in run.quarantine if row["value"] == "green"]
    assert set(reasons) == {"label missing from train"} and len(reasons) == 3 + (4 - 3)
    for file in (dirty / "train/red").glob("*.png"):
        file.write_bytes(b"")
    assert any(
        "only one class" in problem
        for problem in setup_problems(skipping(image_run(), dirty, max_skipped_fraction=0.9))
    )


def test_raise_reports_split_row_and_path_from_header(image_run, dirty):
    problems = setup_problems(with_data(image_run(), source=str(dirty)))
    invalid_headers = [name for name, (kind, _) in INVALID_FILES.items() if not kind.startswith("truncated")]
    for name in invalid_headers:
        assert sum(f"({dirty / name}): {INVALID_FILES[name][1]}" in problem for problem in problems) == 1
    assert all("--data.on_error skip" in problem for problem in problems)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_raises_single_line_error(workers, image_run, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    file = folder / "train/green/05.png"
    file.write_bytes(file.read_bytes()[:-600])
    run = with_data(image_run(), source=str(folder), num_workers=workers)
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    model = hftl.build_model(run, task.head)
    rows = task.encode(splits["train"], model.processor, 0, None)
    loader = make_loader(
        rows, lambda: eval_batches(len(rows), None, Share(0, 1, 8)), task.collate, device="cpu", num_workers=workers
    )
    with pytest.raises(DataError) as raised:
        list(loader)
    (problem,) = raised.value.problems
    assert problem.startswith(f"train row 17: the image ({file}) cannot be decoded: truncated image: ")
    assert str(raised.value) == problem and "\n" not in problem and "Traceback" not in problem


def test_max_pixels_applies_to_embedded_images(image_run, tmp_path):
    from datasets import Dataset, Features, Image, Value

    contents = [VALID["png"]()[0]] * 4 + [INVALID["header bomb"]()[0]]
    features = Features({"image": Image(), "label": Value("string")})
    table = {"image": [{"bytes": content, "path": None} for content in contents], "label": list("abab") + ["a"]}
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    run = with_data(image_run(batch_size_per_device=2), source=str(tmp_path), validation_fraction=0.0)
    (problem,) = setup_problems(run)
    assert "row 4 (in the table): too large: 60000 x 60000 pixels, the limit is 64,000,000" in problem
    run, splits, task = hftl.setup_run(skipping(run, tmp_path, max_pixels=2000), hftl.ImageClassification)
    assert len(splits["train"]) == 4 and task.state()["inputs"] == {"column": "image", "max_pixels": 2000}
    (problem,) = setup_problems(with_data(run, on_error="raise", max_pixels=1919))
    assert "train has 5 unreadable image(s): row 0 (in the table): too large: 48 x 40" in problem


def test_narrow_image_is_resized_to_input_size(tmp_path):
    from datasets import Dataset

    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    content = VALID["20 to 1"]()[0]
    dataset = Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    for seed in (None, 0):
        rows = ImageRows(dataset, "image", ImageProcessor(config | {"crop_pct": 0.9}, hftl.AugmentConfig()), seed)
        assert rows.fetch([0], 0)[0]["pixel_values"].shape == (3, 224, 224)


DIFFERENT_QUARANTINE_JOB = """
import os
import sys
from dataclasses import replace
import hftl
from hftl.logging import leave_process_group
source, name, out = sys.argv[1:]
data = hftl.DataConfig(source=source, on_error="skip", max_skipped_fraction=0.5)
train = hftl.TrainConfig(batch_size_per_device=4, trackers=[])
run = hftl.RunConfig(data, hftl.ModelConfig(name), train=train, output_dir=out)
run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
if os.environ["RANK"] == "1":  # simulates one more readable file on this process
    run = replace(run, quarantine=run.quarantine[1:])
try:
    hftl.create_accelerator(run)
except hftl.errors.DataError as error:
    print("raised:", error, flush=True)
leave_process_group()
"""


@pytest.mark.slow
def test_processes_with_different_quarantine_raise(dirty, tiny_timm, tmp_path):
    (tmp_path / "job.py").write_text(DIFFERENT_QUARANTINE_JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    arguments = [str(tmp_path / "job.py"), str(dirty), tiny_timm["test_resnet"], str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    completed = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert completed.returncode == 0, completed.stderr[-3000:]
    message = "raised: data.on_error: processes skipped different rows (rows per process: 6, 5)"
    assert completed.stdout.count(message) == 2


# Texts and labels


@pytest.fixture
def tables(texts, tmp_path) -> Path:
    """Text tables with empty texts, missing labels, and test labels missing in train."""
    folder = shutil.copytree(texts, tmp_path / "tables")

    def change(name, **lines):
        content = (folder / name).read_text().splitlines()
        for number, line in lines.items():
            content[1 + int(number[1:])] = line
        (folder / name).write_text("\n".join(content) + "\n")

    change("train.csv", r3=",animal", r7="the cat,", r8='"  ",', r20="a rice soup,")
    change("test.csv", r0="a violin,music", r12=",tool")
    return folder


def test_skip_drops_empty_texts_and_invalid_labels(tables, text_run):
    run, splits, _ = hftl.setup_run(skipping(text_run(), tables), hftl.TextClassification)
    hftl.create_accelerator(run)
    records = [(row["split"], row["row"], row["column"], row["reason"]) for row in read_records(run.output_dir)]
    assert records == [
        ("train", 3, "text", "no text"),
        ("train", 7, "label", "no label"),
        ("train", 8, "text", "no text"),
        ("train", 20, "label", "no label"),
        ("test", 0, "label", "label missing from train"),
        ("test", 12, "text", "no text"),
    ]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 56, "validation": 12, "test": 11}
    assert read_records(run.output_dir)[4]["value"] == "music"
    assert sorted(set(splits["train"]["label"])) == ["animal", "food", "tool"]


def test_default_raises_all_invalid_rows(tables, text_run):
    problems = setup_problems(with_data(text_run(), source=str(tables)), hftl.TextClassification)
    for message in (
        "train column 'text' has 2 empty",
        "train has 3 row(s) without a label",
        "test has 1 row(s) of class",
    ):
        assert any(message in problem for problem in problems), (message, problems)


# Custom tasks


class ValidatingTarget:
    """Target that rejects two training rows."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return getattr(self.target, name)

    def invalid_rows(self, splits):
        return {"train": {row: BadRow("invalid digit", "label", str(row)) for row in (1, 2)}}


def test_custom_task_may_validate_rows(tmp_path):
    recipe = load_recipe("custom_task")
    run = replace(recipe.DEFAULTS, output_dir=str(tmp_path / "run"))
    run = with_data(run, max_train_samples_per_class=4, on_error="skip")
    assert hftl.setup_run(run, recipe.DigitQuestions)[0].quarantine == ()

    class ValidatingTask(recipe.DigitQuestions):
        def __init__(self, splits):
            inputs, target = recipe.ImageInputs.find(splits), ValidatingTarget(recipe.ParityAndSize())
            hftl.SupervisedTask.__init__(self, inputs, target)

    quarantine = hftl.setup_run(run, ValidatingTask)[0].quarantine
    assert [(row["row"], row["reason"]) for row in quarantine] == [(1, "invalid digit"), (2, "invalid digit")]


def test_task_without_invalid_rows_raises(image_run, dirty):
    class MinimalTask:
        """Task with the members of the protocol only."""

        def __init__(self, splits):
            task = hftl.ImageClassification(splits)
            names = (
                "name",
                "modality",
                "head",
                "best_metric",
                "encode",
                "collate",
                "loss",
                "metrics",
                "decode",
                "state",
            )
            self.__dict__.update({name: getattr(task, name) for name in names})

    (problem,) = setup_problems(skipping(image_run(), dirty), MinimalTask)
    assert problem == "data.on_error: 'skip' needs the method invalid_rows(), missing in MinimalTask. Set raise."
