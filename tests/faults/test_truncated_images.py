"""Truncated images with valid headers: reported by check and skip, or with their row during a run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import with_data
from detection_data import make_coco
from launch import flags
from multimodal_data import write_pairs
from pair_data import captioned, write_lines
from PIL import Image

import hftl
from hftl.data.usable_rows import load_usable_splits
from hftl.errors import RowError
from hftl.features.parquet import write_features
from hftl.loading.loader import Share, train_batches

STEP_ROWS = 8


def truncate(file: Path) -> bytes:
    """Removes the last third of a file; returns the original content."""
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 3])
    return content


def row_of_step(step: int, rank: int = 0, world: int = 1) -> int:
    """Returns a training row that a process loads in a step, counted from 1."""
    batches = train_batches(36, None, Share(rank, world, STEP_ROWS // world), 0, 0)
    return next(row for number, batch in enumerate(batches, 1) if number == step for _, row, _ in batch)


def training_file(folder: Path, row: int) -> Path:
    return folder / "train" / ("blue", "green", "red")[row // 12] / f"{row % 12:02d}.png"


def train(run) -> dict[str, float]:
    """Trains and evaluates as recipes do, without saving the model; returns metrics and losses."""
    run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run)
    losses = {f"loss {record['step']}": record["train/loss"] for record in history.records if "train/loss" in record}
    return metrics | losses


@pytest.fixture
def folder(images, tmp_path) -> Path:
    return shutil.copytree(images, tmp_path / "images")


@pytest.fixture
def run(folder, image_run):
    """10 steps of 8 rows, with an evaluation per epoch."""
    return with_data(image_run(num_epochs=2, logging_steps=1), source=str(folder), num_workers=0)


def row_problem(run) -> str:
    with pytest.raises(RowError) as raised:
        train(run)
    (problem,) = raised.value.problems
    assert raised.value.exit_code == 2 and "\n" not in problem
    assert problem.count("--data.on_error skip") == problem.count("'hftl check'") == 1
    return problem


def resume_with_skip(run, capsys) -> tuple[dict[str, float], str]:
    """Resumes the run with `skip`; returns its result and log."""
    capsys.readouterr()
    result = train(with_data(replace(run, resume="auto"), on_error="skip", max_skipped_fraction=0.5))
    return result, capsys.readouterr().out


def train_from_scratch(run, tmp_path, **data) -> dict[str, float]:
    return train(with_data(replace(run, output_dir=str(tmp_path / "scratch")), **data))


def checkpoints(run) -> list[str]:
    return [path.name for path in sorted(Path(run.output_dir, "checkpoints").glob("step-*"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_error_includes_row_and_saves_checkpoint(workers, run, folder):
    row = row_of_step(3)
    file = training_file(folder, row)
    truncate(file)
    problem = row_problem(with_data(run, num_workers=workers))
    assert problem.startswith(f"train row {row}: the image ({file}) cannot be decoded: truncated image: ")
    assert "The checkpoint after step 2 is saved. Then run the same command with --resume auto." in problem
    assert checkpoints(run) == ["step-00000002"]


def test_resume_after_repair_matches_uninterrupted_run(run, folder, tmp_path):
    expected = train_from_scratch(run, tmp_path)
    file = training_file(folder, row_of_step(3))
    content = truncate(file)
    row_problem(run)
    file.write_bytes(content)
    assert train(replace(run, resume="auto")) == expected


def test_resume_with_skipped_training_row_restarts(run, folder, tmp_path, capsys):
    row = row_of_step(3)
    truncate(training_file(folder, row))
    row_problem(run)
    result, logged = resume_with_skip(run, capsys)
    assert "resume: 1 train row(s) of the checkpoint after step 2 are now skipped" in logged
    assert "restarts from step 0" in logged and result == train_from_scratch(run, tmp_path, on_error="skip")
    assert f'"row": {row}' in Path(run.output_dir, "quarantine.jsonl").read_text()


@pytest.mark.parametrize(("split", "step"), [("val", 5), ("test", 10)])
def test_resume_with_skipped_held_out_row_matches(split, step, run, folder, tmp_path, capsys):
    file = folder / split / "green" / "01.png"
    truncate(file)
    problem = row_problem(run)
    name = {"val": "validation"}.get(split, split)
    assert problem.startswith(f"{name} row 4: the image ({file}) cannot be decoded") and "--resume auto" in problem
    assert checkpoints(run)[-1] == f"step-{step:08d}"
    result, logged = resume_with_skip(run, capsys)
    assert f"after step {step} from" in logged and "restarts" not in logged
    assert result == train_from_scratch(run, tmp_path, on_error="skip", max_skipped_fraction=0.5)


def test_resume_with_other_rows_preserves_checkpoint(run, folder):
    truncate(training_file(folder, row_of_step(3)))
    row_problem(run)
    (folder / "train/red/new.png").write_bytes((folder / "train/red/01.png").read_bytes())
    with pytest.raises(hftl.errors.CheckpointError, match="other training rows"):
        train(with_data(replace(run, resume="auto"), on_error="skip"))
    assert checkpoints(run) == ["step-00000002"]


@pytest.mark.parametrize("method", ["frozen", "probe"])
def test_feature_extraction_error_includes_row(method, run, folder, tmp_path, capsys):
    run = replace(run, adapt=hftl.AdaptConfig(method=method))
    file = training_file(folder, 20)
    truncate(file)
    problem = row_problem(run)
    assert problem.startswith(f"train row 20: the image ({file}) cannot be decoded") and "--resume auto" in problem
    result, _ = resume_with_skip(run, capsys)
    assert result == train_from_scratch(run, tmp_path, on_error="skip")


@pytest.mark.parametrize("command", ["rank", "features"])
def test_rank_and_features_raise_with_row_or_skip(command, run, folder, tmp_path):
    data, name = replace(run.data, max_skipped_fraction=0.5), run.model.name

    def run_command(data):
        if command == "rank":
            return hftl.rank(data, [name], output=None).rows
        return write_features(data, name, output=str(tmp_path / "features"))

    file = training_file(folder, 20)
    truncate(file)
    with pytest.raises(RowError, match=r"train row 20: the image .* cannot be decoded.*--data.on_error skip"):
        run_command(data)
    truncate(folder / "test/red/00.png")
    (folder / "train/red/00.png").write_bytes(b"")
    result = run_command(replace(data, on_error="skip"))
    assert result == 34 if command == "rank" else set(result) == {"train", "validation", "test"}


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_processes_raise_one_error_and_resume(split, forks, folder, tiny_timm, tmp_path):
    file = training_file(folder, row_of_step(3, 1, 2)) if split == "train" else folder / "val/green/01.png"
    truncate(file)
    settings = {"train__max_steps": 10, "train__batch_size_per_device": 4, "train__trackers": "[]"}
    settings |= {"data__num_workers": 0, "resume": "auto"}
    options = {"recipe": "image_classification", "processes": 2, "faults": [("skip_report", [])]}
    command = flags(folder, tiny_timm["test_resnet"], tmp_path / "run", **settings)
    statuses, output = forks.run(command, tmp_path / "logs", **options)
    assert statuses == [2, 2], output
    assert f"the image ({file}) cannot be decoded" in output and "is saved. Then run the same command" in output
    assert not any("Error:" in log.read_text() for log in (tmp_path / "logs").glob("*-1.txt"))
    skip = [*command, "--data.on_error=skip", "--data.max_skipped_fraction=0.5"]
    statuses, output = forks.run(skip, tmp_path / "logs", **options)
    assert statuses == [0, 0], output
    assert ("restarts from step 0" in output) == (split == "train")


# hftl check and data.on_error skip


def class_folders(folder: Path) -> tuple[type, Path]:
    for split, count in {"train": 8, "test": 3}.items():
        for name in ("blue", "red"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise(len(name) * 100 + number).save(folder / split / name / f"{number}.png")
    return hftl.ImageClassification, folder / "train/red/3.png"


def parquet(folder: Path) -> tuple[type, Path]:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    task, file = class_folders(folder / "files")
    truncate(file)
    files = sorted((folder / "files/train").rglob("*.png"))
    columns = {"image": [{"bytes": image.read_bytes(), "path": None} for image in files]}
    columns["label"] = [image.parent.name for image in files]
    features = Features({"image": ImageColumn(), "label": Value("string")})
    (folder / "table").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(folder / "table/train.parquet")
    return task, folder / "table"


def image_and_texts(folder: Path) -> tuple[type, Path]:
    write_pairs(folder, {"train": 24, "test": 8})
    return hftl.ImageTextClassification, folder / "images/train011.png"


def captions(folder: Path) -> tuple[type, Path]:
    write_lines(folder, train=captioned(folder / "images", 24))
    return hftl.ImageTextRetrieval, folder / "images/0-11.png"


def boxes(folder: Path) -> tuple[type, Path]:
    return hftl.ObjectDetection, make_coco(folder) / "images/train/train3.png"


def masked(folder: Path) -> tuple[type, Path]:
    for split, count in {"train": 6, "val": 2}.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            noise(number).save(folder / split / "images" / f"{number}.png")
            mask = np.random.default_rng(number).integers(0, 3, (24, 24), dtype=np.uint8)
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
    return hftl.SemanticSegmentation, folder / "train/images/3.png"


def bad_mask(folder: Path) -> tuple[type, Path]:
    return masked(folder)[0], folder / "train/masks/3.png"


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


ROWS = {
    class_folders: 11,
    parquet: 11,
    image_and_texts: 11,
    captions: 11,
    boxes: 3,
    masked: 3,
    bad_mask: 3,
}


@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_check_and_skip_report_truncated_image(make, tmp_path):
    task, file = make(tmp_path / "data")
    source = file if file.is_dir() else tmp_path / "data"
    if file.is_file():
        truncate(file)
    finding = hftl.check(str(source), output=tmp_path / "check")["unreadable"]
    assert [(entry.split, entry.row) for entry in finding.entries] == [("train", ROWS[make])]
    why = finding.entries[0].why
    assert why.startswith("truncated image") and (file.is_dir() or str(file) in why)
    data = hftl.DataConfig(source=str(source), on_error="skip", max_skipped_fraction=0.5)
    _, invalid = load_usable_splits(data, task)
    assert {split: list(rows) for split, rows in invalid.items() if rows} == {"train": [ROWS[make]]}
