"""Rows that cannot be used: refused by name, or left out, written down, and as if they had never been there."""

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
from pictures import BAD, GOOD

import hftl
from hftl.cli.main import main
from hftl.data.source import load_splits
from hftl.data.validation import FILE, BadRow
from hftl.errors import ConfigError, DataError
from hftl.loading.loader import Share, eval_batches, make_loader
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows

SPOILED = {
    "train/red/03.png": ("half a png", "truncated image"),
    "train/blue/00.png": ("text", "not an image"),
    "train/green/11.png": ("zero bytes", "empty file"),
    "val/blue/01.png": ("header bomb", "too large"),
    "test/green/01.png": ("float tiff", "pixels without a known white"),
    "test/green/02.png": ("half a jpeg", "truncated image"),
}


@pytest.fixture
def dirty(images, tmp_path) -> Path:
    """The folder of images with bad files in every split."""
    folder = shutil.copytree(images, tmp_path / "dirty")
    for name, (kind, _) in SPOILED.items():
        (folder / name).write_bytes(BAD[kind]()[0])
    return folder


@pytest.fixture
def clean(images, tmp_path) -> Path:
    """The same folder without those files."""
    folder = shutil.copytree(images, tmp_path / "clean")
    for name in SPOILED:
        (folder / name).unlink()
    return folder


def skipping(run, source, **changes):
    return with_data(run, source=str(source), on_error="skip", **{"max_skipped_fraction": 0.5} | changes)


def rows_of(splits, folder):
    from datasets import Image

    found = {}
    for split, rows in splits.items():
        table = rows.cast_column("image", Image(decode=False))[:]
        paths = [str(Path(image["path"]).relative_to(folder)) for image in table["image"]]
        found[split] = list(zip(paths, table["label"], strict=True))
    return found


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / FILE).read_text().splitlines()]


def refused(run, task=hftl.ImageClassification) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        hftl.setup_run(run, task)
    return raised.value.problems


# Images


@pytest.mark.parametrize("inside", ["", "train"], ids=["own validation", "validation cut off"])
@pytest.mark.parametrize("few", [None, 5])
def test_the_rest_is_what_the_source_would_be_without_the_bad_rows(inside, few, image_run, dirty, clean):
    one, other = (
        hftl.setup_run(
            skipping(image_run(), folder / inside, max_train_samples_per_class=few, validation_fraction=0.2), task
        )[1]
        for folder, task in ((dirty, hftl.ImageClassification), (clean, hftl.ImageClassification))
    )
    found = rows_of(one, dirty)
    assert found == rows_of(other, clean) and set(found) >= {"train", "validation"}
    assert not set(SPOILED) & {path for rows in found.values() for path, _ in rows}


def test_each_bad_row_is_written_down_with_its_place_in_the_source(image_run, dirty, capsys):
    run, _, _ = hftl.setup_run(skipping(image_run(), dirty), hftl.ImageClassification)
    said = capsys.readouterr().out
    assert "data: train: 3 of 36 rows left out (1 x " in said and f"listed in {run.output_dir}/{FILE}" in said
    assert "data: test: 2 of 10 rows left out (1 x pixels without a known white, 1 x truncated image)" in said
    assert not Path(run.output_dir, FILE).exists(), "the folder may still be refused"
    hftl.create_accelerator(run)
    whole = rows_of(load_splits(run.data), dirty)
    found = listed(run.output_dir)
    assert len(found) == len(SPOILED)
    for row in found:
        assert set(row) == {"split", "row", "column", "value", "path", "reason"}
        name = str(Path(row["path"]).relative_to(dirty))
        assert whole[row["split"]][row["row"]][0] == name and row["reason"].startswith(SPOILED[name][1])
    assert not list(Path(run.output_dir).glob("*.partial"))


def test_training_measures_exactly_what_it_would_without_the_bad_rows(image_run, dirty, clean, tmp_path):
    made = []
    for folder in (dirty, clean):
        run = replace(skipping(image_run(), folder), output_dir=str(tmp_path / f"run of {folder.name}"))
        run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        hftl.fit(accelerator, model, task, splits, run)
        file = Path(run.output_dir, "predictions.parquet")
        metrics = hftl.evaluate(accelerator, model, task, splits, run, file)
        made.append((metrics, pq.read_table(file), Path(run.output_dir, FILE).exists()))
    (metrics, predictions, is_listed), (expected, wanted, none) = made
    assert metrics == expected and predictions.equals(wanted)
    assert is_listed and not none


@pytest.mark.slow
def test_what_comes_after_training_knows_what_was_left_out(image_run, dirty, clean, tmp_path, capsys):
    run = skipping(image_run(), dirty)
    metrics, place = load_recipe("image_classification").main(run), Path(run.output_dir)
    facts = json.loads((place / "report.json").read_text())
    assert facts["left_out"] == {"train": 3, "validation": 1, "test": 2}
    assert facts["rows"] == {"train": 33, "validation": 8, "test": 8}
    assert "skipped: train 3, validation 1, test 2" in (place / "model/README.md").read_text()
    assert not list((place / "model").rglob(FILE)), "values of the data stay out of what is pushed"

    # its own data again: the same rows, seen by the same numbers
    capsys.readouterr()
    assert main(["evaluate", str(place)]) in (0, None)
    assert f"{metrics['test/accuracy']:.4f}"[:6] in capsys.readouterr().out
    (place / "report.html").unlink()
    assert main(["report", str(place)]) in (0, None)
    assert "data cannot be" not in (place / "report.html").read_text().lower()

    # the same decoding in prediction, and the bad one is named
    model = hftl.load(place)
    odd = tmp_path / "odd.jpg"
    odd.write_bytes(GOOD["16-bit png"]()[0])
    rows = model.encode(model._dataset([odd])).fetch([0], 0)
    grey = tmp_path / "grey.png"
    grey.write_bytes(GOOD["grey png"]()[0])
    assert np.array_equal(
        rows[0]["pixel_values"], model.encode(model._dataset([grey])).fetch([0], 0)[0]["pixel_values"]
    )
    with pytest.raises(DataError, match=r"row 1: the image \(.*green/01.png\) cannot be decoded: pixels without"):
        model.predict([str(odd), str(dirty / "test/green/01.png")])

    # a later run without bad rows leaves no old list behind
    again = replace(skipping(image_run(), clean), output_dir=str(place), overwrite=True)
    hftl.create_accelerator(hftl.setup_run(again, hftl.ImageClassification)[0])
    assert not (place / FILE).exists()


def test_too_many_bad_rows_are_refused_with_counts_and_first_reasons(image_run, dirty):
    train, test = refused(skipping(image_run(), dirty, max_skipped_fraction=0.12)), None
    assert len(train) == 1 and "2 of 10 rows of test cannot be used" in train[0]
    train, validation, test = refused(skipping(image_run(), dirty, max_skipped_fraction=0.0))
    assert "3 of 36 rows of train" in train and "1 x truncated image" in train and "1 x not an image" in train
    assert f"row 0 ({dirty}/train/blue/00.png): not an image" in train and "data.max_skipped_fraction" in train
    assert "1 of 9 rows of validation" in validation and "2 of 10 rows of test" in test
    hftl.setup_run(
        skipping(image_run(), dirty, max_skipped_fraction=0.2), hftl.ImageClassification
    )  # 2 of 10 are not more


def test_a_split_of_bad_rows_alone_is_refused_whatever_the_bound(image_run, dirty):
    for file in (dirty / "test").rglob("*.png"):
        file.write_bytes(b"")
    (problem,) = refused(skipping(image_run(), dirty, max_skipped_fraction=1.0))
    assert "10 of 10 rows of test cannot be used (10 x empty file)" in problem


def test_a_class_whose_training_images_are_all_broken_is_left_out_everywhere(image_run, dirty, images):
    for file in (dirty / "train/green").glob("*.png"):
        file.write_bytes(b"")
    run, splits, task = hftl.setup_run(skipping(image_run(), dirty), hftl.ImageClassification)
    assert {label for rows in splits.values() for label in rows["label"]} == {0, 2}
    kinds = [row["reason"] for row in run.quarantine if row["value"] == "green"]
    assert set(kinds) == {"label that train lacks"} and len(kinds) == 3 + (4 - 3)
    for file in (dirty / "train/red").glob("*.png"):
        file.write_bytes(b"")
    assert any(
        "only one class" in problem for problem in refused(skipping(image_run(), dirty, max_skipped_fraction=0.9))
    )


def test_refusing_names_split_row_and_path_from_the_header_alone(image_run, dirty):
    problems = refused(with_data(image_run(), source=str(dirty)))
    headers = [name for name, (kind, _) in SPOILED.items() if not kind.startswith("half")]
    for name in headers:
        assert sum(f"({dirty / name}): {SPOILED[name][1]}" in problem for problem in problems) == 1
    assert all("--data.on_error skip" in problem for problem in problems)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_fails_only_when_decoded_is_one_clean_sentence(workers, image_run, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    half = folder / "train/green/05.png"
    half.write_bytes(half.read_bytes()[:-600])
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
    assert problem.startswith(f"train row 17: the image ({half}) cannot be decoded: truncated image: ")
    assert str(raised.value) == problem and "\n" not in problem and "Traceback" not in problem


def test_the_limit_holds_for_images_inside_tables_and_is_kept_by_the_task(image_run, tmp_path):
    from datasets import Dataset, Features, Image, Value

    contents = [GOOD["png"]()[0]] * 4 + [BAD["header bomb"]()[0]]
    features = Features({"image": Image(), "label": Value("string")})
    table = {"image": [{"bytes": content, "path": None} for content in contents], "label": list("abab") + ["a"]}
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    run = with_data(image_run(batch_size_per_device=2), source=str(tmp_path), validation_fraction=0.0)
    (problem,) = refused(run)
    assert "row 4 (in the table): too large: 60000 x 60000 pixels, the limit is 64,000,000" in problem
    run, splits, task = hftl.setup_run(skipping(run, tmp_path, max_pixels=2000), hftl.ImageClassification)
    assert len(splits["train"]) == 4 and task.state()["inputs"] == {"column": "image", "max_pixels": 2000}
    (problem,) = refused(with_data(run, on_error="raise", max_pixels=1919))
    assert "train has 5 unreadable image(s): row 0 (in the table): too large: 48 x 40" in problem


def test_narrow_images_cost_little_and_wider_ones_are_refused(tmp_path):
    from datasets import Dataset

    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    content = GOOD["20 to 1"]()[0]
    dataset = Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    for seed in (None, 0):
        rows = ImageRows(dataset, "image", ImageProcessor(config | {"crop_pct": 0.9}, hftl.AugmentConfig()), seed)
        assert rows.fetch([0], 0)[0]["pixel_values"].shape == (3, 224, 224)


DISAGREEING = """
import os
import sys
from dataclasses import replace
import hftl
from hftl.logging import leave_process_group
source, name, out = sys.argv[1:]
data = hftl.DataConfig(source=source, on_error="skip", max_skipped_fraction=0.5)
train = hftl.TrainConfig(batch_size_per_device=4, trackers=[])
run = hftl.RunConfig(data, hftl.ModelConfig(name), train=train, output_dir=out)
run, splits, task = hftl.prepare(run, hftl.ImageClassification)
if os.environ["RANK"] == "1":  # as if this process had read one more of the files
    run = replace(run, quarantine=run.quarantine[1:])
try:
    hftl.start(run)
except hftl.errors.DataError as error:
    print("refused:", error, flush=True)
leave_process_group()
"""


@pytest.mark.slow
def test_processes_that_left_out_different_rows_do_not_start(dirty, tiny_timm, tmp_path):
    (tmp_path / "job.py").write_text(DISAGREEING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    arguments = [str(tmp_path / "job.py"), str(dirty), tiny_timm["test_resnet"], str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("refused: data.on_error: the processes left out different rows (so many each: 6, 5)") == 2


# Texts and labels


@pytest.fixture
def tables(texts, tmp_path) -> Path:
    """The tables of texts with empty texts, missing labels, and labels in test that train lacks."""
    folder = shutil.copytree(texts, tmp_path / "tables")

    def change(name, **lines):
        content = (folder / name).read_text().splitlines()
        for number, line in lines.items():
            content[1 + int(number[1:])] = line
        (folder / name).write_text("\n".join(content) + "\n")

    change("train.csv", r3=",animal", r7="the cat,", r8='"  ",', r20="a rice soup,")
    change("test.csv", r0="a violin,music", r12=",tool")
    return folder


def test_empty_texts_and_missing_and_unseen_labels_are_left_out(tables, text_run):
    run, splits, _ = hftl.setup_run(skipping(text_run(), tables), hftl.TextClassification)
    hftl.create_accelerator(run)
    found = [(row["split"], row["row"], row["column"], row["reason"]) for row in listed(run.output_dir)]
    assert found == [
        ("train", 3, "text", "no text"),
        ("train", 7, "label", "no label"),
        ("train", 8, "text", "no text"),
        ("train", 20, "label", "no label"),
        ("test", 0, "label", "label that train lacks"),
        ("test", 12, "text", "no text"),
    ]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 56, "validation": 12, "test": 11}
    assert listed(run.output_dir)[4]["value"] == "music"
    assert sorted(set(splits["train"]["label"])) == ["animal", "food", "tool"]


def test_refusing_is_the_default_and_says_all(tables, text_run):
    problems = refused(with_data(text_run(), source=str(tables)), hftl.TextClassification)
    for words in (
        "train column 'text' has 2 empty",
        "train has 3 row(s) without a label",
        "test has 1 row(s) of class",
    ):
        assert any(words in problem for problem in problems), (words, problems)


# Tasks of others


class Odd:
    """A target that calls some digits unusable."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return getattr(self.target, name)

    def invalid_rows(self, splits):
        return {"train": {row: BadRow("an odd digit", "label", str(row)) for row in (1, 2)}}


def test_a_task_of_ones_own_may_judge_rows_or_not(tmp_path):
    recipe = load_recipe("custom_task")
    run = replace(recipe.DEFAULTS, output_dir=str(tmp_path / "run"))
    run = with_data(run, max_train_samples_per_class=4, on_error="skip")
    whole = hftl.setup_run(run, recipe.DigitQuestions)[0]
    assert whole.quarantine == ()

    class Judging(recipe.DigitQuestions):
        def __init__(self, splits):
            hftl.SupervisedTask.__init__(self, recipe.ImageInputs.find(splits), Odd(recipe.TwoQuestions()))

    found = hftl.setup_run(run, Judging)[0].quarantine
    assert [(row["row"], row["reason"]) for row in found] == [(1, "an odd digit"), (2, "an odd digit")]


def test_a_task_that_cannot_judge_is_refused_not_ignored(image_run, dirty):
    class Bare:
        """The members of the protocol and no more."""

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

    (problem,) = refused(skipping(image_run(), dirty), Bare)
    assert "data.on_error: this task cannot say which rows are of no use" in problem
