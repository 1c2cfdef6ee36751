"""Resume after a stop signal: bitwise identical to the uninterrupted run."""

import json
from itertools import product

import pyarrow.parquet as pq
import pytest
from launch import flags, launch
from safetensors.torch import load_file

KINDS = ("text", "image")
METHODS = ("full", "lora", "frozen")
FAST = {("text", "lora", 0, 3, 2), ("image", "full", 2, 1, 1)}
"""(kind, method, workers, accumulation, processes); the slow suite has all cells."""
CELLS = list(product(KINDS, METHODS, (0, 2), (1, 3), (1, 2)))


@pytest.fixture
def job(texts, images, tiny_bert, tiny_timm, tmp_path):
    """Factory of jobs with dropout, augmentation and clipping: 13 steps over several epochs, evaluation every 3."""

    def make(cell, name, **more):
        kind, method, workers, accumulation, world = cell
        stop_after = more.pop("stop_after", None)
        out = tmp_path / "-".join(map(str, cell)) / name
        options = {
            "train.max_steps": 13,
            "train.eval_steps": 3,
            "train.logging_steps": 2,
            "train.lr": 1e-3,
            "train.head_lr": 1e-2,
            # trainable batch norms need at least two rows per batch
            "train.batch_size_per_device": (6 if kind == "text" else 12) // accumulation // world,
            "train.gradient_accumulation_steps": accumulation,
            "data.num_workers": workers,
            "model.dropout": 0.1,
            "adapt.batch_norm": "train" if method == "full" else "auto",
            **more,
        }
        source, model = (texts, tiny_bert) if kind == "text" else (images, tiny_timm["test_resnet"])
        spec = {"recipe": f"{kind}_classification", "flags": flags(source, model, out, method, **options)}
        return "recipe", {**spec, "stop_after": stop_after}, out

    return make


def outcome(folder):
    """Returns everything that must be bitwise equal."""
    files = sorted(folder.rglob("*.safetensors"))
    compared = [file for file in files if "checkpoints" not in file.parts or "best" in file.parts]
    weights = {str(file.relative_to(folder)): load_file(file) for file in compared}
    bits = {f: {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in w.items()} for f, w in weights.items()}
    texts = [(folder / name).read_text() for name in ("history.jsonl", "metrics.json")]
    return bits, texts, pq.read_table(folder / "predictions.parquet")


def assert_equal(folder, reference):
    actual, expected = outcome(folder), outcome(reference)
    assert actual[0].keys() == expected[0].keys()
    for name, tensors in expected[0].items():
        different = [key for key in tensors if tensors[key] != actual[0][name][key]]
        assert not different, (name, different)
    assert actual[1] == expected[1]
    assert actual[2] == expected[2]
    assert not list(folder.rglob("*.partial"))


def run_cells(cells, job, extra_jobs=(), **options):
    """Runs each cell uninterrupted, and with a SIGTERM during an epoch and a resume in new processes; compares both."""
    jobs = {(world, turn): [] for world in (1, 2) for turn in (1, 2)}
    for number, cell in enumerate(cells):
        jobs[cell[-1], 1] += [job(cell, "reference"), job(cell, "stopped", stop_after=4 + number % 5)]
        jobs[cell[-1], 2].append(job(cell, "stopped", resume="auto"))
    for world, turn, extra in extra_jobs:
        jobs[world, turn].append(extra)
    batches = [(world, jobs[world, turn]) for turn in (1, 2) for world in (1, 2) if jobs[world, turn]]
    printed = [launch(world, batch, 2500, **options) for world, batch in batches]
    for cell in cells:
        assert_equal(job(cell, "stopped")[2], job(cell, "reference")[2])
    return "".join(printed)


def test_resume_matches_run_and_keeps_rows_of_steps(job, forks, tmp_path):
    """Two cells, and a run started on two processes and resumed on one, with losses equal up to rounding."""
    cell = ("text", "full", 0, 1, 2)
    quiet = {"model.dropout": 0.0, "adapt.batch_norm": "frozen"}  # nothing random
    first_jobs = [job(cell, "reference", **quiet), job(cell, "stopped", stop_after=5, **quiet)]
    resumed = job(cell, "stopped", resume="auto", **quiet)
    extra_jobs = [*((2, 1, each) for each in first_jobs), (1, 2, resumed)]
    output = run_cells(sorted(FAST), job, extra_jobs, forks=forks, logs=tmp_path)
    assert "(saved with 2 process(es); steps have the same rows, rounding differs)" in output
    expected, actual = (
        [json.loads(line) for line in (each[2] / "history.jsonl").read_text().splitlines()]
        for each in (first_jobs[0], resumed)
    )
    assert [record["step"] for record in expected] == [record["step"] for record in actual]
    for record, reference in zip(actual, expected, strict=True):
        assert record.get("train/loss", 0.0) == pytest.approx(reference.get("train/loss", 0.0), rel=1e-3)
        assert record.get("lr/head") == reference.get("lr/head")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_matches_uninterrupted_run_in_every_cell(kind, job):
    cells = [cell for cell in CELLS if cell[0] == kind]
    run_cells(cells, job)
    print(f"\nresume: {len(cells)} cells of {kind} bitwise equal ({len(CELLS)} in all)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stop_after_every_step_matches_uninterrupted_run(kind, job):
    cell = (kind, "full", 0, 1, 1)
    launch(1, [job(cell, "reference")])
    for step in range(1, 14):  # after the last step, an evaluation is pending
        launch(1, [job(cell, "stopped", stop_after=step, resume="auto")])
    launch(1, [job(cell, "stopped", resume="auto")])
    assert_equal(job(cell, "stopped")[2], job(cell, "reference")[2])
