"""`hftl` commands recipes, copy, run, doctor, evaluate and predict; outputs match the metrics of the run."""

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, WORDS, run_undrawn

from hftl import AdaptConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from hftl.cli.main import find_recipe, main

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


@pytest.fixture(scope="module")
def image_model(images, tiny_timm, tmp_path_factory) -> Path:
    """Run folder of a short run on the color images."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    train = TrainConfig(num_epochs=3, lr=1e-2, head_lr=1e-2, batch_size_per_device=6, trackers=[])
    run = RunConfig(DataConfig(str(images)), ModelConfig(tiny_timm["test_resnet"]), train=train, output_dir=str(folder))
    run_undrawn("image_classification", run)
    return folder


@pytest.fixture(scope="module")
def text_model(texts, tiny_bert, tmp_path_factory) -> Path:
    """Run folder of a short run on the texts, truncated to 8 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "texts"
    train = TrainConfig(num_epochs=3, lr=1e-2, head_lr=1e-2, batch_size_per_device=10, trackers=[])
    run = RunConfig(
        DataConfig(str(texts), max_length=8), ModelConfig(tiny_bert), AdaptConfig("lora"), train, output_dir=str(folder)
    )
    run_undrawn("text_classification", run)
    return folder


@pytest.fixture
def hftl(capsys):
    """Returns a function that runs a command in this process and returns its output."""

    def run(*arguments) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def rejected(capsys):
    """Returns a function that runs a command, asserts exit status 2, and returns the error message."""

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and "Traceback" not in printed.err
        return printed.err

    return run


def run_predictions(folder: Path, split: str = "test") -> list[dict]:
    """Returns the predictions of a split in the run folder."""
    return [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == split]


def read(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    parsers = {"row": int, "confidence": float, "probabilities": json.loads}
    return [row | {name: parse(row[name]) for name, parse in parsers.items()} for row in rows]


def lines(printed: str) -> list[dict[str, str]]:
    """Returns the rows of a tab-separated table."""
    return list(csv.DictReader(printed.splitlines(), delimiter="\t"))


def assert_equal_predictions(rows: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    assert [float(row["confidence"]) for row in rows] == pytest.approx(
        [row["confidence"] for row in expected], abs=tolerance
    )


# Recipes


def test_recipes_command_lists_all_recipes(hftl):
    printed = hftl("recipes").splitlines()
    assert [line.split()[0] for line in printed] == RECIPES and len(RECIPES) >= 3
    assert all(len(line.split()) > 4 for line in printed)


def test_copy_command_never_overwrites(hftl, rejected, tmp_path):
    original = (ROOT / "recipes" / "image_classification.py").read_text()
    (tmp_path / "existing").mkdir()
    files = {
        "existing": "existing/image_classification.py",
        "new/mine.py": "new/mine.py",
        "other": "other/image_classification.py",
    }
    for destination, file in files.items():
        assert str(tmp_path / file) in hftl("copy", "image_classification", tmp_path / destination)
        assert (tmp_path / file).read_text() == original
        (tmp_path / file).write_text("changed")
        assert f"'{tmp_path / file}' exists" in rejected("copy", "image_classification", tmp_path / destination)
        assert (tmp_path / file).read_text() == "changed"


@pytest.mark.parametrize(
    "command", [["copy"], ["run"], ["run", "--num_processes", "2"], ["run", "--config_file", "a.yaml"]]
)
def test_unknown_recipe_raises_with_suggestion(command, rejected):
    message = rejected(*command, "image_clasification")
    assert "'image_clasification'" in message and "Did you mean 'image_classification'?" in message
    assert all(name in message for name in RECIPES)


def test_find_recipe_returns_name_or_file(tmp_path, monkeypatch, rejected):
    assert find_recipe("text_classification") == ROOT / "recipes" / "text_classification.py"
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mine.py") == Path("mine.py")
    assert "'yours.py'" in rejected("run", "yours.py")
    assert "recipe: is missing" in rejected("run", "--cpu")


def test_help_exits_with_0(capsys):
    for arguments, text in (
        (["--help"], "doctor"),
        ([], "doctor"),
        (["predict", "--help"], "--output"),
        (["run"], "RECIPE"),
    ):
        try:
            main(arguments)
        except SystemExit as ended:
            assert ended.code == 0
        assert text in capsys.readouterr().out


def run_command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = "from hftl.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_run_forwards_help_to_recipe():
    done = run_command("run", "image_classification", "--help")
    assert done.returncode == 0 and "--train.lr" in done.stdout and "--adapt.lora.r" in done.stdout


def test_run_forwards_launcher_config_and_recipe_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, sys\nprint('got', sys.argv[1:], os.environ['ACCELERATE_MIXED_PRECISION'])\nsys.exit(3)\n"
    )
    config = ["compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", "use_cpu: true", "mixed_precision: bf16"]
    (tmp_path / "accelerate_config.yaml").write_text("\n".join([*config, "num_processes: 1"]))
    done = run_command("run", "--num_machines", "1", "mine.py", "--train.lr", "3e-4", "--overwrite", cwd=tmp_path)
    assert "got ['--train.lr', '3e-4', '--overwrite'] bf16" in done.stdout
    assert done.returncode != 0, "the command returns the exit status of the recipe"


# Doctor


def test_doctor_prints_versions_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    versions = dict(line.split()[:2] for line in printed.splitlines() if line.startswith("  "))
    for name in ("torch", "timm", "transformers", "datasets", "accelerate", "peft"):
        assert versions[name] == importlib.metadata.version(name)
    assert "offline" in printed and ("GPU" in printed or "cuda" in printed or "mps" in printed)


# Evaluate


@pytest.mark.parametrize("fixture", ["image_model", "text_model"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_matches_run_metrics(fixture, split, request, hftl, tmp_path):
    folder = request.getfixturevalue(fixture)
    stored = json.loads((folder / "metrics.json").read_text())
    stored = {name: value for name, value in stored.items() if name.startswith(split)}
    output = tmp_path / "rows.parquet"
    printed = hftl("evaluate", folder, "--split", split, "--batch_size", 4, "--output", output)
    metrics = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if line.startswith(f"{split}/")}
    assert len(stored) > 5 and metrics == pytest.approx(stored, abs=1e-4)
    assert_equal_predictions(read(output), run_predictions(folder, split))
    assert [row["label"] for row in read(output)] == [row["label"] for row in run_predictions(folder, split)]


def test_evaluate_model_folder_matches_run_folder(image_model, images, hftl, tmp_path):
    shutil.copytree(image_model / "model", tmp_path / "moved")
    printed = hftl("evaluate", tmp_path / "moved", "--data", images)
    assert printed.splitlines()[-1] == hftl("evaluate", image_model).splitlines()[-1]


def test_evaluate_preserves_class_ids_on_new_data(image_model, images, hftl, tmp_path):
    for label in ("red", "green"):
        shutil.copytree(images / "test" / label, tmp_path / "new" / "test" / label)
    expected = [row for row in run_predictions(image_model) if row["label"] != "blue"]
    accuracy = sum(row["prediction"] == row["label"] for row in expected) / len(expected)
    printed = hftl("evaluate", image_model, "--data", tmp_path / "new", "--output", tmp_path / "rows.jsonl")
    assert f"{'test/accuracy':<28} {accuracy:.4f}" in printed
    assert_equal_predictions(read(tmp_path / "rows.jsonl"), expected)


def test_evaluate_new_data_needs_no_train_split(text_model, texts, hftl, tmp_path):
    shutil.copy(texts / "test.csv", tmp_path / "test.csv")
    printed = hftl("evaluate", text_model, "--data", tmp_path)
    assert printed.splitlines()[-1] == hftl("evaluate", text_model).splitlines()[-1]
    hftl(
        "evaluate", text_model, "--data", texts / "test.csv", "--split", "train", "--output", tmp_path / "rows.parquet"
    )
    assert len(read(tmp_path / "rows.parquet")) == 13


def test_evaluate_rejects_unknown_classes(image_model, text_model, images, rejected, tmp_path):
    shutil.copytree(images / "test" / "red", tmp_path / "new" / "test" / "crimson")
    shutil.copytree(images / "test" / "green", tmp_path / "new" / "test" / "green")
    message = rejected("evaluate", image_model, "--data", tmp_path / "new")
    assert "class(es) crimson are unknown" in message and "blue, green, red" in message
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "test.csv").write_text("text,label\ncat,animal\nbread,drink\n")
    message = rejected("evaluate", text_model, "--data", tmp_path / "table")
    assert "drink" in message and "column 'label'" in message
    (tmp_path / "table" / "test.csv").write_text("text,kind\ncat,animal\n")
    message = rejected("evaluate", text_model, "--data", tmp_path / "table")
    assert "label column(s) 'label' are missing. Columns: text, kind" in message


def test_evaluate_missing_split_raises_with_existing_ones(text_model, texts, rejected):
    message = rejected("evaluate", text_model, "--data", texts / "test.csv")
    assert "--split: 'test' is missing" in message and "allowed: train" in message


def test_commands_reject_folders_without_run_or_model(images, rejected, tmp_path):
    for folder in (images, tmp_path / "nothing"):
        for command in (["evaluate", folder], ["predict", folder, "x"]):
            assert f"'{folder}' is not a run folder or model folder" in rejected(*command)


# Predict


def test_predict_image_matches_run(image_model, images, hftl):
    files = sorted((images / "test").rglob("*.png"))
    for number in (0, 5, 9):
        [row] = lines(hftl("predict", image_model, files[number]))
        assert row["input"] == str(files[number])
        assert_equal_predictions([row], [run_predictions(image_model)[number]], tolerance=1e-4)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_predict_image_folder_writes_table(ending, image_model, images, hftl, tmp_path):
    output = tmp_path / f"rows{ending}"
    printed = hftl("predict", image_model, images / "test", "--output", output, "--batch_size", 3)
    assert printed.splitlines()[-1] == f"predict: wrote 10 predictions to {output}"
    rows = read(output)
    assert [row["input"] for row in rows] == sorted(str(file) for file in (images / "test").rglob("*.png"))
    assert [row["row"] for row in rows] == list(range(10))
    assert_equal_predictions(rows, run_predictions(image_model))
    for row, expected in zip(rows, run_predictions(image_model), strict=True):
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_predict_table_of_image_files_matches_run(image_model, images, hftl, tmp_path):
    """Paths are relative to the table; paths outside of its folder are rejected."""
    shutil.copytree(images / "test", tmp_path / "photos")
    files = sorted(file.relative_to(tmp_path) for file in (tmp_path / "photos").rglob("*.png"))
    rows = [f"{number},{file}" for number, file in enumerate(files)]
    (tmp_path / "files.csv").write_text("\n".join(["number,image", *rows]))
    assert_equal_predictions(
        lines(hftl("predict", image_model, tmp_path / "files.csv")), run_predictions(image_model), tolerance=1e-4
    )


def test_predict_text_matches_run(text_model, texts, hftl):
    rows = read_csv(texts / "test.csv")
    for number in (0, 7):
        printed = hftl("predict", text_model, rows[number]["text"])
        assert_equal_predictions(lines(printed), [run_predictions(text_model)[number]], tolerance=1e-4)
        assert len(printed.splitlines()) == 2, "the table only"


def test_predict_text_table_prints_or_writes_rows(text_model, texts, hftl, tmp_path):
    printed = hftl("predict", text_model, texts / "test.csv", "--batch_size", 5)
    assert len(printed.splitlines()) == 14
    assert_equal_predictions(lines(printed), run_predictions(text_model), tolerance=1e-4)
    unlabeled = tmp_path / "new.csv"
    rows = [f"{number},{row['text']}" for number, row in enumerate(read_csv(texts / "test.csv"))]
    unlabeled.write_text("\n".join(["id,text", *rows]))
    hftl("predict", text_model, unlabeled, "--output", tmp_path / "rows.jsonl")
    assert_equal_predictions(read(tmp_path / "rows.jsonl"), run_predictions(text_model))


def test_predict_accepts_any_text(text_model, hftl):
    for text in ("", "word", "a/b", "one.csv two.csv", "cat " * 2000, "Ünï\tcode\nlines"):
        [row] = lines(hftl("predict", text_model, text))
        assert row["prediction"] in WORDS


@pytest.mark.parametrize(
    ("fixture", "argument", "expected"),
    [
        ("image_model", "test/red/00.pgn", "does not exist"),
        ("image_model", "test/red/000.png", "does not exist"),
        ("image_model", "test/rde", "Did you mean 'red'?"),
        ("image_model", "empty", "no images"),
        ("image_model", "notes.txt", "is invalid. Pass an image"),
        ("image_model", "table.csv", "lacks column(s) image. Columns: id, words"),
        ("text_model", "tabel.csv", "Did you mean 'table.csv'?"),
        ("text_model", "table.csv", "lacks column(s) text. Columns: id, words"),
        ("text_model", "notes.txt", "is not a table"),
        ("text_model", "test", "is not a table"),
    ],
)
def test_predict_rejects_invalid_input(fixture, argument, expected, request, rejected, images, tmp_path, monkeypatch):
    folder = request.getfixturevalue(fixture)
    shutil.copytree(images / "test", tmp_path / "test")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "table.csv").write_text("id,words\n1,cat\n")
    monkeypatch.chdir(tmp_path)
    message = rejected("predict", folder, argument)
    assert "INPUT: " in message and f"'{argument}'" in message and expected in message


def test_predict_unreadable_image_raises_with_path(image_model, images, rejected, tmp_path):
    shutil.copytree(images / "test", tmp_path / "test")
    (tmp_path / "test/red/01.png").write_text("not an image")
    assert str(tmp_path / "test/red/01.png") in rejected("predict", image_model, tmp_path / "test")


def test_predict_rejects_pair_for_single_text_model(text_model, rejected):
    assert "takes one text" in rejected("predict", text_model, "cat", "--pair", "dog")


def test_predict_rejects_invalid_output_before_inference(text_model, rejected, tmp_path):
    for command in (["predict", text_model, "cat"], ["evaluate", text_model]):
        assert "allowed: .parquet, .csv, .jsonl" in rejected(*command, "--output", tmp_path / "rows.xlsx")
        assert f"folder '{tmp_path / 'gone'}' does not exist" in rejected(
            *command, "--output", tmp_path / "gone" / "rows.csv"
        )
    assert "at least 1" in rejected("predict", text_model, "cat", "--batch_size", 0)
    assert not list(tmp_path.iterdir())


def read_csv(file: Path) -> list[dict]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))
