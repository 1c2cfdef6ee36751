"""`hftl …` around a training: recipes, evaluate, predict, doctor; what is printed is what was measured."""

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
    """The run folder of a small training on the coloured images."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    train = TrainConfig(num_epochs=3, lr=1e-2, head_lr=1e-2, batch_size_per_device=6, trackers=[])
    run = RunConfig(DataConfig(str(images)), ModelConfig(tiny_timm["test_resnet"]), train=train, output_dir=str(folder))
    run_undrawn("image_classification", run)
    return folder


@pytest.fixture(scope="module")
def text_model(texts, tiny_bert, tmp_path_factory) -> Path:
    """The run folder of a small training on the texts, cut at 8 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "texts"
    train = TrainConfig(num_epochs=3, lr=1e-2, head_lr=1e-2, batch_size_per_device=10, trackers=[])
    run = RunConfig(
        DataConfig(str(texts), max_length=8), ModelConfig(tiny_bert), AdaptConfig("lora"), train, output_dir=str(folder)
    )
    run_undrawn("text_classification", run)
    return folder


@pytest.fixture
def hftl(capsys):
    """Returns a function that runs a command in this process and returns what it printed."""

    def run(*arguments) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Returns a function that runs a command that must end with status 2, and returns its message."""

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and "Traceback" not in printed.err
        return printed.err

    return run


def measured(folder: Path, split: str = "test") -> list[dict]:
    """Returns the predictions that the run itself wrote for a split."""
    return [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == split]


def read(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    kinds = {"row": int, "confidence": float, "probabilities": json.loads}
    return [row | {name: kind(row[name]) for name, kind in kinds.items()} for row in rows]


def lines(printed: str) -> list[dict[str, str]]:
    """Returns the rows of a tab-separated table."""
    return list(csv.DictReader(printed.splitlines(), delimiter="\t"))


def agree(found: list[dict], wanted: list[dict], tolerance: float = 1e-5) -> None:
    assert [row["prediction"] for row in found] == [row["prediction"] for row in wanted]
    assert [float(row["confidence"]) for row in found] == pytest.approx(
        [row["confidence"] for row in wanted], abs=tolerance
    )


# Recipes


def test_recipes_lists_every_recipe_with_what_it_does(hftl):
    printed = hftl("recipes").splitlines()
    assert [line.split()[0] for line in printed] == RECIPES and len(RECIPES) >= 3
    assert all(len(line.split()) > 4 for line in printed)


def test_copy_gives_the_recipe_and_never_overwrites(hftl, refused, tmp_path):
    original = (ROOT / "recipes" / "image_classification.py").read_text()
    (tmp_path / "there").mkdir()
    places = {
        "there": "there/image_classification.py",
        "new/mine.py": "new/mine.py",
        "other": "other/image_classification.py",
    }
    for given, file in places.items():
        assert str(tmp_path / file) in hftl("copy", "image_classification", tmp_path / given)
        assert (tmp_path / file).read_text() == original
        (tmp_path / file).write_text("changed")
        assert f"'{tmp_path / file}' exists" in refused("copy", "image_classification", tmp_path / given)
        assert (tmp_path / file).read_text() == "changed"


@pytest.mark.parametrize(
    "command", [["copy"], ["run"], ["run", "--num_processes", "2"], ["run", "--config_file", "a.yaml"]]
)
def test_a_wrong_recipe_names_the_nearest(command, refused):
    message = refused(*command, "image_clasification")
    assert "'image_clasification'" in message and "Did you mean 'image_classification'?" in message
    assert all(name in message for name in RECIPES)


def test_a_recipe_is_found_by_name_or_file(tmp_path, monkeypatch, refused):
    assert find_recipe("text_classification") == ROOT / "recipes" / "text_classification.py"
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mine.py") == Path("mine.py")
    assert "'yours.py'" in refused("run", "yours.py")
    assert "say which recipe" in refused("run", "--cpu")


def test_help_ends_well(capsys):
    for arguments, said in (
        (["--help"], "doctor"),
        ([], "doctor"),
        (["predict", "--help"], "--output"),
        (["run"], "RECIPE"),
    ):
        try:
            main(arguments)
        except SystemExit as ended:
            assert ended.code == 0
        assert said in capsys.readouterr().out


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = "from hftl.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_help_of_a_recipe_passes_through():
    done = start("run", "image_classification", "--help")
    assert done.returncode == 0 and "--train.lr" in done.stdout and "--adapt.lora.r" in done.stdout


def test_run_hands_over_to_the_launcher_with_its_configuration_and_the_recipes_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, sys\nprint('got', sys.argv[1:], os.environ['ACCELERATE_MIXED_PRECISION'])\nsys.exit(3)\n"
    )
    config = ["compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", "use_cpu: true", "mixed_precision: bf16"]
    (tmp_path / "accelerate_config.yaml").write_text("\n".join([*config, "num_processes: 1"]))
    done = start("run", "--num_machines", "1", "mine.py", "--train.lr", "3e-4", "--overwrite", cwd=tmp_path)
    assert "got ['--train.lr', '3e-4', '--overwrite'] bf16" in done.stdout
    assert done.returncode != 0, "the status of the recipe is the status of the command"


# Doctor


def test_doctor_prints_what_is_installed_and_is_content(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    versions = dict(line.split()[:2] for line in printed.splitlines() if line.startswith("  "))
    for name in ("torch", "timm", "transformers", "datasets", "accelerate", "peft"):
        assert versions[name] == importlib.metadata.version(name)
    assert "offline" in printed and ("GPU" in printed or "cuda" in printed or "mps" in printed)


# Evaluate


@pytest.mark.parametrize("which", ["image_model", "text_model"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_measures_what_the_run_measured(which, split, request, hftl, tmp_path):
    folder = request.getfixturevalue(which)
    stored = json.loads((folder / "metrics.json").read_text())
    stored = {name: value for name, value in stored.items() if name.startswith(split)}
    output = tmp_path / "rows.parquet"
    printed = hftl("evaluate", folder, "--split", split, "--batch_size", 4, "--output", output)
    found = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if line.startswith(f"{split}/")}
    assert len(stored) > 5 and found == pytest.approx(stored, abs=1e-4)
    agree(read(output), measured(folder, split))
    assert [row["label"] for row in read(output)] == [row["label"] for row in measured(folder, split)]


def test_the_model_folder_alone_is_enough(image_model, images, hftl, tmp_path):
    shutil.copytree(image_model / "model", tmp_path / "moved")
    printed = hftl("evaluate", tmp_path / "moved", "--data", images)
    assert printed.splitlines()[-1] == hftl("evaluate", image_model).splitlines()[-1]


def test_evaluate_numbers_classes_as_in_training_whatever_the_new_data_hold(image_model, images, hftl, tmp_path):
    for label in ("red", "green"):
        shutil.copytree(images / "test" / label, tmp_path / "new" / "test" / label)
    known = [row for row in measured(image_model) if row["label"] != "blue"]
    wanted = sum(row["prediction"] == row["label"] for row in known) / len(known)
    printed = hftl("evaluate", image_model, "--data", tmp_path / "new", "--output", tmp_path / "rows.jsonl")
    assert f"{'test/accuracy':<28} {wanted:.4f}" in printed
    agree(read(tmp_path / "rows.jsonl"), known)


def test_new_data_need_no_training_rows_and_no_validation_is_cut_from_them(text_model, texts, hftl, tmp_path):
    shutil.copy(texts / "test.csv", tmp_path / "test.csv")
    printed = hftl("evaluate", text_model, "--data", tmp_path)
    assert printed.splitlines()[-1] == hftl("evaluate", text_model).splitlines()[-1]
    hftl(
        "evaluate", text_model, "--data", texts / "test.csv", "--split", "train", "--output", tmp_path / "rows.parquet"
    )
    assert len(read(tmp_path / "rows.parquet")) == 13


def test_a_class_that_the_model_does_not_know_is_refused(image_model, text_model, images, refused, tmp_path):
    shutil.copytree(images / "test" / "red", tmp_path / "new" / "test" / "crimson")
    shutil.copytree(images / "test" / "green", tmp_path / "new" / "test" / "green")
    message = refused("evaluate", image_model, "--data", tmp_path / "new")
    assert "class(es) crimson are unknown" in message and "blue, green, red" in message
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "test.csv").write_text("text,label\ncat,animal\nbread,drink\n")
    message = refused("evaluate", text_model, "--data", tmp_path / "table")
    assert "drink" in message and "column 'label'" in message
    (tmp_path / "table" / "test.csv").write_text("text,kind\ncat,animal\n")
    message = refused("evaluate", text_model, "--data", tmp_path / "table")
    assert "label column(s) 'label' are missing. Columns: text, kind" in message


def test_a_split_that_is_not_there_names_those_that_are(text_model, texts, refused):
    message = refused("evaluate", text_model, "--data", texts / "test.csv")
    assert "--split: 'test' is missing" in message and "allowed: train" in message


def test_a_folder_that_is_no_run_is_refused(images, refused, tmp_path):
    for folder in (images, tmp_path / "nothing"):
        for command in (["evaluate", folder], ["predict", folder, "x"]):
            assert f"'{folder}' is not a run folder or model folder" in refused(*command)


# Predict


def test_one_image_is_predicted_as_in_the_run(image_model, images, hftl):
    files = sorted((images / "test").rglob("*.png"))
    for number in (0, 5, 9):
        [row] = lines(hftl("predict", image_model, files[number]))
        assert row["input"] == str(files[number])
        agree([row], [measured(image_model)[number]], tolerance=1e-4)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_a_folder_of_images_goes_into_a_table(ending, image_model, images, hftl, tmp_path):
    output = tmp_path / f"rows{ending}"
    printed = hftl("predict", image_model, images / "test", "--output", output, "--batch_size", 3)
    assert printed.splitlines()[-1] == f"predict: wrote 10 predictions to {output}"
    rows = read(output)
    assert [row["input"] for row in rows] == sorted(str(file) for file in (images / "test").rglob("*.png"))
    assert [row["row"] for row in rows] == list(range(10))
    agree(rows, measured(image_model))
    for row, wanted in zip(rows, measured(image_model), strict=True):
        assert row["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_a_table_of_image_files_is_predicted(image_model, images, hftl, tmp_path):
    """Paths are relative to the table; those that lead out of its folder are refused."""
    shutil.copytree(images / "test", tmp_path / "photos")
    files = sorted(file.relative_to(tmp_path) for file in (tmp_path / "photos").rglob("*.png"))
    rows = [f"{number},{file}" for number, file in enumerate(files)]
    (tmp_path / "files.csv").write_text("\n".join(["number,image", *rows]))
    agree(lines(hftl("predict", image_model, tmp_path / "files.csv")), measured(image_model), tolerance=1e-4)


def test_a_text_is_predicted_as_in_the_run(text_model, texts, hftl):
    rows = read_csv(texts / "test.csv")
    for number in (0, 7):
        printed = hftl("predict", text_model, rows[number]["text"])
        agree(lines(printed), [measured(text_model)[number]], tolerance=1e-4)
        assert len(printed.splitlines()) == 2, "a table, and nothing else"


def test_a_table_of_texts_is_predicted_on_the_terminal_and_into_files(text_model, texts, hftl, tmp_path):
    printed = hftl("predict", text_model, texts / "test.csv", "--batch_size", 5)
    assert len(printed.splitlines()) == 14
    agree(lines(printed), measured(text_model), tolerance=1e-4)
    unlabelled = tmp_path / "new.csv"
    rows = [f"{number},{row['text']}" for number, row in enumerate(read_csv(texts / "test.csv"))]
    unlabelled.write_text("\n".join(["id,text", *rows]))
    hftl("predict", text_model, unlabelled, "--output", tmp_path / "rows.jsonl")
    agree(read(tmp_path / "rows.jsonl"), measured(text_model))


def test_any_text_is_a_text_however_long_or_odd(text_model, hftl):
    for text in ("", "word", "a/b", "one.csv two.csv", "cat " * 2000, "Ünï\tcode\nlines"):
        [row] = lines(hftl("predict", text_model, text))
        assert row["prediction"] in WORDS


@pytest.mark.parametrize(
    ("which", "given", "said"),
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
def test_an_input_that_cannot_be_predicted_is_refused(
    which, given, said, request, refused, images, tmp_path, monkeypatch
):
    folder = request.getfixturevalue(which)
    shutil.copytree(images / "test", tmp_path / "test")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "table.csv").write_text("id,words\n1,cat\n")
    monkeypatch.chdir(tmp_path)
    message = refused("predict", folder, given)
    assert "INPUT: " in message and f"'{given}'" in message and said in message


def test_an_unreadable_image_among_many_is_named(image_model, images, refused, tmp_path):
    shutil.copytree(images / "test", tmp_path / "test")
    (tmp_path / "test/red/01.png").write_text("not an image")
    assert str(tmp_path / "test/red/01.png") in refused("predict", image_model, tmp_path / "test")


def test_a_second_text_is_refused_by_a_model_of_single_texts(text_model, refused):
    assert "takes one text" in refused("predict", text_model, "cat", "--pair", "dog")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(text_model, refused, tmp_path):
    for command in (["predict", text_model, "cat"], ["evaluate", text_model]):
        assert "allowed: .parquet, .csv, .jsonl" in refused(*command, "--output", tmp_path / "rows.xlsx")
        assert f"folder '{tmp_path / 'gone'}' does not exist" in refused(
            *command, "--output", tmp_path / "gone" / "rows.csv"
        )
    assert "at least 1" in refused("predict", text_model, "cat", "--batch_size", 0)
    assert not list(tmp_path.iterdir())


def read_csv(file: Path) -> list[dict]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))
