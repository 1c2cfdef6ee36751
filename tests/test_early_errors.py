"""Errors of `setup_run` before any file is written: setting, value, allowed values and suggestion."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, with_data
from PIL import Image

import hftl
from hftl.config.parse import parse_config
from hftl.config.schema import AdaptConfig, LoraConfig, ModelConfig
from hftl.errors import ConfigError
from hftl.run_folder.folder import RUN_FILES


def setup_problems(run, task=hftl.ImageClassification) -> list[str]:
    """Returns the problems of a run and asserts that `setup_run` created no run folder."""
    folder = Path(run.output_dir)
    existed = folder.exists()
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, task)
    assert folder.exists() == existed, "setup_run created the run folder"
    problems = caught.value.problems
    assert len(problems) == len(set(problems))
    for problem in problems:
        assert problem in str(caught.value) and "\n" not in problem
    return problems


def text_setup_problems(run) -> list[str]:
    return setup_problems(run, hftl.TextClassification)


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def with_model(run, name: str):
    return replace(run, model=replace(run.model, name=name))


@pytest.fixture
def image_copy(images, tmp_path) -> Path:
    """Copy of the images that tests may modify."""
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture
def table(text_run, tmp_path):
    """Returns a function that creates a text run on a table with the given lines."""

    def make(*lines: str, name: str = "train.csv", **options):
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / name).write_text("\n".join(lines) + "\n")
        return with_data(text_run(batch_size_per_device=2), source=str(tmp_path / "tables"), **options)

    return make


VALID_LINES = ("text,label", *(f"words {number},{'xy'[number % 2]}" for number in range(8)))


def test_setup_run_accepts_valid_runs(image_run, text_run, table):
    for run, task in (
        (image_run(), hftl.ImageClassification),
        (text_run(), hftl.TextClassification),
        (table(*VALID_LINES), hftl.TextClassification),
    ):
        resolved, splits, bound = hftl.setup_run(run, task)
        assert (
            replace(resolved.train, freeze_backbone_ratio=None) == run.train
            and "validation" in splits
            and bound.head.num_outputs >= 2
        )
        assert not Path(run.output_dir).exists()


# Model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet5O", ["timm has no model 'resnet5O'", "Did you mean", "'resnet50'"]),
        ("vit_base_patch16_24", ["'vit_base_patch16_24'", "'vit_base_patch16_224'"]),
        ("resnet18.a1_in1kk", ["'resnet18.a1_in1kk' has no weights 'a1_in1kk'", "a2_in1k", "Did you mean 'a1_in1k'?"]),
        ("local-dir:no/such/folder", ["'no/such/folder'", "config.json"]),
        ("embedded:leters", ["'leters'", "Did you mean 'letters'?"]),
        ("hub:timm/resnet18", ["unknown prefix 'hub:'", "hf-hub:, local-dir:, embedded:"]),
    ],
)
def test_unknown_image_model_raises_with_suggestion(name, expected, image_run):
    problem = only(setup_problems(with_model(image_run(), name)))
    assert problem.startswith("model.name: ")
    for text in expected:
        assert text in problem


def test_model_folder_without_prefix_raises_with_prefix(image_run, tmp_path):
    assert f"Set local-dir:{tmp_path}" in only(setup_problems(with_model(image_run(), str(tmp_path))))


def test_missing_text_model_folder_raises_with_suggestion(text_run, tiny_bert, tmp_path):
    problem = only(text_setup_problems(with_model(text_run(), tiny_bert[:-1] + "x")))
    assert f"folder '{tiny_bert[:-1]}x' does not exist" in problem
    assert f"Did you mean '{Path(tiny_bert).name}'?" in problem
    assert "has no config.json" in only(text_setup_problems(with_model(text_run(), str(tmp_path))))
    assert "'not a name!' is neither a folder nor a repo id" in only(
        text_setup_problems(with_model(text_run(), "not a name!"))
    )


def test_unmatched_lora_patterns_raise_with_suggestion(image_run, text_run, capsys):
    def with_patterns(run, *patterns):
        return replace(run, adapt=AdaptConfig("lora", LoraConfig(target_modules=list(patterns))))

    first, second = setup_problems(with_patterns(image_run("test_vit"), "qkw", "fc1", "nonsense.*["))
    assert "adapt.lora.target_modules: 'qkw' matches no" in first and "Did you mean 'qkv'?" in first
    assert "allowed: fc1, fc2, proj, qkv" in first
    assert "'nonsense.*['" in second and "Did you mean" not in second
    assert "head" not in first, "the head takes no adapters"
    assert "Did you mean 'query'?" in only(text_setup_problems(with_patterns(text_run(), "key", "querry")))
    hftl.setup_run(with_patterns(image_run("test_vit"), "qkv", r"blocks\.\d+\.mlp\.fc1"), hftl.ImageClassification)
    assert "random weights" not in capsys.readouterr().out, "the model of the check is not logged"


# Data


def test_missing_data_folder_raises_with_suggestion(image_run, text_run, image_copy, monkeypatch):
    missing = str(image_copy.parent / "imagse")
    problem = only(setup_problems(with_data(image_run(), source=missing)))
    assert problem == f"data.source: '{missing}' does not exist. Did you mean 'images'?"
    monkeypatch.chdir(image_copy.parent)
    for source in ("./imagse", "imagse"):
        problem = only(setup_problems(with_data(image_run(), source=source)))
        assert f"'{source}'" in problem and "Did you mean 'images'?" in problem
    assert "Did you mean 'digits'?" in only(setup_problems(with_data(image_run(), source="embedded:digit")))
    assert "allowed: .csv" in only(text_setup_problems(with_data(text_run(), source=__file__)))


def test_folder_without_images_raises_with_file_types(image_run, tmp_path):
    for name in ("a/notes.txt", "a/clip.mp4"):
        (tmp_path / "things" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "things" / name).write_text("x")
    problem = only(setup_problems(with_data(image_run(), source=str(tmp_path / "things"))))
    assert f"no images in '{tmp_path / 'things'}' (file types found: .mp4, .txt)" in problem
    (tmp_path / "empty").mkdir()
    assert "file types found: none" in only(setup_problems(with_data(image_run(), source=str(tmp_path / "empty"))))


def test_unreadable_images_raise_with_paths_by_split(image_run, image_copy):
    corrupt = [image_copy / "train/red/03.png", image_copy / "train/blue/00.png", image_copy / "test/green/01.png"]
    corrupt[0].write_bytes(b"")
    corrupt[1].write_text("this is not an image")
    corrupt[2].write_bytes(np.arange(99, dtype=np.uint8).tobytes())
    in_train, in_test = setup_problems(with_data(image_run(), source=str(image_copy)))
    assert "train has 2 unreadable image(s)" in in_train and "test has 1 unreadable image(s)" in in_test
    for path, problem in zip(corrupt, (in_train, in_train, in_test), strict=True):
        assert str(path) in problem


def test_many_unreadable_images_raise_with_count(image_run, image_copy):
    for file in (image_copy / "train").rglob("*.png"):
        file.write_bytes(b"")
    problem = only(setup_problems(with_data(image_run(), source=str(image_copy))))
    assert "36 unreadable image(s)" in problem and len(problem) < 1500


def test_missing_image_files_of_table_raise_with_paths(image_run, images, tmp_path):
    existing, missing = tmp_path / "existing.png", tmp_path / "missing.png"
    existing.write_bytes((images / "train/red/00.png").read_bytes())
    lines = ["image,label", *(f"{file},{label}" for file in (existing, missing) for label in "xyxy")]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    run = with_data(image_run(batch_size_per_device=2), source=str(tmp_path / "table.csv"), validation_fraction=0.0)
    problem = only(setup_problems(run))
    assert "4 unreadable image(s)" in problem and str(missing) in problem and str(existing) not in problem


def test_missing_column_raises_with_suggestion(image_run, text_run):
    problem = only(setup_problems(with_data(image_run(), image_column="imgae")))
    assert "data.image_column: there is no column 'imgae'. Did you mean 'image'?" in problem
    problems = text_setup_problems(with_data(text_run(), text_column="texts", label_column="lable"))
    assert "data.text_column: there is no column 'texts'. Did you mean 'text'?" in problems[0]
    assert "data.label_column: there is no column 'lable'. Did you mean 'label'?" in problems[1]
    problem = only(text_setup_problems(with_data(text_run(), text_pair_column="txet")))
    assert "data.text_pair_column: there is no column 'txet'. Did you mean 'text'?" in problem


def test_images_without_classes_raise(image_run, images, tmp_path):
    shutil.copytree(images / "train" / "red", tmp_path / "flat")
    problem = only(setup_problems(with_data(image_run(), source=str(tmp_path / "flat"), validation_fraction=0.0)))
    assert "data.label_column: no label column found. Columns: image (Image)" in problem


def test_ambiguous_text_columns_raise_with_names(table):
    problem = only(text_setup_problems(table("title,body,label", *(f"a,b,{number % 2}" for number in range(8)))))
    assert "title and body could each be the text" in problem and "--data.text_column NAME" in problem


def test_missing_labels_raise_with_count_by_split(table):
    table(*VALID_LINES[:5], "no label,", "none either,", name="dev.csv")
    in_train, in_validation = text_setup_problems(table(*VALID_LINES, "no label,"))
    assert "train has 1 row(s) without a label in column 'label'" in in_train
    assert "validation has 2 row(s) without a label in column 'label'" in in_validation


def test_single_class_raises(table, image_run, image_copy):
    problem = only(text_setup_problems(table("text,label", *(f"words {number},same" for number in range(8)))))
    assert "train has only one class ('same') in column 'label'; two are needed" in problem
    for split in ("train", "val", "test"):
        for label in ("red", "blue"):
            shutil.rmtree(image_copy / split / label)
    problem = only(setup_problems(with_data(image_run(), source=str(image_copy))))
    assert "train has only one class ('green')" in problem


def test_class_missing_from_train_raises_with_name(table, image_run, image_copy):
    table(*VALID_LINES[:5], "new words,z", "other words,w", name="test.csv")
    problem = only(text_setup_problems(table(*VALID_LINES)))
    assert "test has 2 row(s) of class 'w', 'z', missing from train" in problem
    shutil.rmtree(image_copy / "train" / "red")
    problems = setup_problems(with_data(image_run(), source=str(image_copy)))
    assert [problem.partition(",")[0] for problem in problems] == [
        "data.source: validation has 3 row(s) of class 'red'",
        "data.source: test has 4 row(s) of class 'red'",
    ]


def test_float_labels_as_classes_raise(table):
    run = table("text,label", *(f"words,{number}.5" for number in range(8)))
    problem = only(text_setup_problems(with_data(run, problem_type="single_label_classification")))
    assert "'label' holds real numbers" in problem


def test_empty_texts_raise_with_rows(table):
    lines = list(VALID_LINES)
    lines[1], lines[4] = ",x", "   ,y"
    problem = only(text_setup_problems(table(*lines, validation_fraction=0.0)))
    assert "train column 'text' has 2 empty text(s), at row 0, 3." in problem


def test_too_few_rows_for_validation_split_raise(table):
    problem = only(text_setup_problems(table("text,label", "a,x")))
    assert problem.startswith("data.validation_fraction") and "--data.validation_fraction 0" in problem


def test_effective_batch_larger_than_data_raises(image_run, monkeypatch):
    for batch, accumulation, world in ((37, 1, 1), (8, 5, 1), (10, 2, 2)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        run = image_run(batch_size_per_device=batch, gradient_accumulation_steps=accumulation)
        problem = only(setup_problems(run))
        assert f"effective batch size of {batch * accumulation * world}" in problem and "36 training rows" in problem
        fits = image_run(batch_size_per_device=36 // accumulation // world, gradient_accumulation_steps=accumulation)
        hftl.setup_run(fits, hftl.ImageClassification)


# Settings


def test_invalid_augmentation_policy_raises(image_run):
    run = image_run()
    for policy in ("rnd-m9-mstd0.5", "rand-x9", "nonsense"):
        problem = only(setup_problems(with_data(run, augment=replace(run.data.augment, auto_augment=policy))))
        assert "data.augment.auto_augment" in problem and repr(policy) in problem
    for policy in ("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original"):
        hftl.setup_run(with_data(run, augment=replace(run.data.augment, auto_augment=policy)), hftl.ImageClassification)


def test_unknown_metric_for_best_model_raises_with_suggestion(image_run):
    problem = only(setup_problems(image_run(metric_for_best_model="macrof1")))
    assert (
        "train.metric_for_best_model: 'macrof1'" in problem
        and "accuracy" in problem
        and "Did you mean 'macro_f1'?" in problem
    )
    for name in ("macro_f1", "loss"):
        hftl.setup_run(image_run(metric_for_best_model=name), hftl.ImageClassification)


def test_unloadable_metric_raises_with_name(image_run):
    problem = only(setup_problems(image_run(metrics=["no_such_metric_anywhere"])))
    assert "train.metrics: 'no_such_metric_anywhere'" in problem and "macro_f1" in problem


# Run folder


def test_existing_run_raises_and_stays_unchanged(image_run, tmp_path):
    run = image_run()
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("precious")
    (folder / "config.yaml").write_text("")
    problem = only(setup_problems(run))
    assert f"'{folder}' already contains a run (config.yaml, model)" in problem and "--overwrite" in problem
    assert (folder / "model" / "weights").read_text() == "precious"


def test_overwrite_rejects_folder_without_run(image_run, tmp_path):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("precious")
    problem = only(setup_problems(replace(image_run(), overwrite=True)))
    assert f"'{folder}' contains model but no config.yaml of hftl" in problem
    assert (folder / "model" / "weights").read_text() == "precious"


def test_run_folder_around_inputs_raises(image_run, image_copy):
    run = with_data(image_run(), source=str(image_copy))
    problem = only(setup_problems(replace(run, output_dir=str(image_copy.parent), overwrite=True)))
    assert "contains data.source" in problem
    model = run.model.name.removeprefix("local-dir:")
    assert "contains model.name" in only(setup_problems(replace(run, output_dir=model, overwrite=True)))


def test_overwrite_removes_run_files_only(image_run, tmp_path):
    run = replace(image_run(), overwrite=True)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in RUN_FILES:
        (folder / name).write_text("old") if "." in name else (folder / name / "deep").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    resolved, _, _ = hftl.setup_run(run, hftl.ImageClassification)
    assert (folder / "model" / "deep").is_dir(), "setup_run removes nothing"
    hftl.create_accelerator(resolved)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "figures", "notes.txt"]
    assert (folder / "config.yaml").read_text() != "old"


def test_folder_with_other_files_is_preserved(image_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    resolved, _, _ = hftl.setup_run(image_run(), hftl.ImageClassification)
    hftl.create_accelerator(resolved)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_run_folder_at_or_below_file_raises(image_run, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/run", "file/deep/run"):
        problem = only(setup_problems(replace(image_run(), output_dir=str(tmp_path / folder))))
        assert problem.startswith(f"output_dir: '{tmp_path / folder}'") and "is a file" in problem
    assert (tmp_path / "file").read_text() == "x"


@contextmanager
def unprivileged_user():
    """Runs as an unprivileged user if the tests run as root, which ignores permissions."""
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)
    else:
        yield


def test_unwritable_run_folder_raises(image_run, tmp_path):
    from hftl.run_folder.folder import folder_problems

    open_folder = Path(os.path.realpath("/")) / "usr"
    with unprivileged_user():
        problem = only(folder_problems(replace(image_run(), output_dir=str(open_folder / "runs" / "one"))))
        assert f"no write permission in '{open_folder}'" in problem
    closed = tmp_path / "closed"
    (closed / "inside").mkdir(parents=True)
    closed.chmod(0)
    with unprivileged_user():
        problem = only(folder_problems(replace(image_run(), output_dir=str(closed / "inside" / "run"))))
    closed.chmod(0o700)
    assert "cannot be accessed: Permission denied" in problem


# All problems at once


def test_setup_run_raises_all_problems_at_once(image_run, tmp_path):
    """One message lists all problems, so that users fix them in one round."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    yaml = tmp_path / "run.yaml"
    yaml.write_text("train: {lr: fast, epochs: 3, warmup_ratio: 1.5}\n")
    flags = [
        "--config",
        str(yaml),
        "--model.name",
        "resnet5O",
        "--data.source",
        str(tmp_path / "imagse"),
        "--train.seed",
        "x",
        "--train.metrics",
        "[no_such_metric]",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    (tmp_path / "images").mkdir()
    problems = setup_problems(parse_config(hftl.RunConfig(), flags, defer=True))
    expected = [
        ("run.yaml: train.lr: 'fast'", "a number"),
        ("run.yaml: there is no setting 'train.epochs'", "'train.num_epochs'"),
        ("command line: train.seed: 'x'", "an integer"),
        ("train.warmup_ratio: 1.5", "[0, 1]"),
        ("imagse' does not exist", "Did you mean 'images'?"),
        ("timm has no model 'resnet5O'", "'resnet50'"),
        ("train.metrics: 'no_such_metric'", "macro_f1"),
        ("already contains a run", "--overwrite"),
    ]
    assert len(problems) == len(expected), problems
    for texts in expected:
        assert sum(all(text in problem for text in texts) for problem in problems) == 1, texts


def test_setup_run_raises_data_model_and_setting_problems(image_run, image_copy, tmp_path):
    (image_copy / "train" / "red" / "00.png").write_bytes(b"")
    shutil.rmtree(image_copy / "train" / "blue")
    run = with_data(image_run("test_vit", lr=-1.0, batch_size_per_device=25), source=str(image_copy))
    run = replace(run, adapt=AdaptConfig("lora", LoraConfig(target_modules=["qkw"])))
    problems = setup_problems(replace(run, output_dir=str(image_copy / "train/red/01.png")))
    for words in (
        "train.lr: -1.0",
        "unreadable image",
        "validation has 3 row(s) of class 'blue'",
        "test has 3 row(s) of class 'blue'",
        "effective batch size of 25",
        "'qkw' matches no",
        "is a file",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 7


def test_setup_run_raises_text_and_label_problems(table):
    lines = list(VALID_LINES)
    lines[2] = ",y"
    table(*VALID_LINES[:5], "words,z", name="test.csv")
    problems = text_setup_problems(with_model(table(*lines, "words,", validation_fraction=0.0), "no/such/model"))
    for words in (
        "'no/such/model' does not exist",
        "1 empty text(s), at row 1",
        "1 row(s) without a label",
        "class 'z'",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 4


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        (
            "image_classification",
            ["--train.lr", "fast", "--model.name=resnet5O", "--data.source=no/such/folder"],
            ["train.lr: 'fast'", "'resnet50'", "'no/such/folder' does not exist"],
        ),
        (
            "text_classification",
            [
                "--train.batch_size=8",
                "--model.name=no/such/model",
                "--data.source=TABLE",
                "--data.validation_fraction=0",
                "--data.problem_type=single_label_classification",
            ],
            ["'train.batch_size_per_device'?", "'no/such/model'", "'label' holds real numbers", "4 empty text(s)"],
        ),
    ],
)
def test_recipe_error_exits_with_status_2(recipe, flags, expected, forks, tmp_path):
    (tmp_path / "table.csv").write_text("text,label\n" + "words,1.5\nwords,2.5\n,1.5\n" * 4)
    flags = [flag.replace("TABLE", str(tmp_path / "table.csv")) for flag in flags]
    command = ["python", ROOT / "recipes" / f"{recipe}.py", "--output_dir", tmp_path / "run", *flags]
    statuses, printed = forks.command(command, tmp_path / "logs", cwd=tmp_path)
    assert statuses == [2] and "Traceback" not in printed
    message = printed[printed.index("ConfigError: ") :]
    for text in expected:
        assert message.count(text) == 1, (text, message)
    assert not (tmp_path / "run").exists()


def test_image_format_is_detected_by_content(image_run, image_copy):
    Image.new("RGB", (20, 20)).save(image_copy / "train/red/00.png", format="JPEG")
    hftl.setup_run(with_data(image_run(), source=str(image_copy)), hftl.ImageClassification)


def test_empty_source_and_model_raise_with_flag(text_run):
    problems = text_setup_problems(replace(with_data(text_run(), source=""), model=ModelConfig()))
    assert problems == ["data.source: is empty. Set --data.source.", "model.name: is empty. Set --model.name."]
