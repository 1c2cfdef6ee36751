"""A training that was stopped and goes on is the one that was not stopped, bit for bit."""

import json
from itertools import product

import pyarrow.parquet as pq
import pytest
from launch import flags, launch
from safetensors.torch import load_file

KINDS = ("text", "image")
METHODS = ("full", "lora", "frozen")
FAST = {("text", "lora", 0, 3, 2), ("image", "full", 2, 1, 1)}
"""(kind, method, workers, accumulation, processes); all cells are in the slow suite."""
CELLS = list(product(KINDS, METHODS, (0, 2), (1, 3), (1, 2)))


@pytest.fixture
def job(texts, images, tiny_bert, tiny_timm, tmp_path):
    """Makes jobs: dropout, augmentation and clipping on, 13 steps over several epochs, an evaluation every 3."""

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
            # batch norms that learn need two rows at once
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
    """Everything that must be equal."""
    files = sorted(folder.rglob("*.safetensors"))
    kept = [file for file in files if "checkpoints" not in file.parts or "best" in file.parts]
    weights = {str(file.relative_to(folder)): load_file(file) for file in kept}
    bits = {f: {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in w.items()} for f, w in weights.items()}
    texts = [(folder / name).read_text() for name in ("history.jsonl", "metrics.json")]
    return bits, texts, pq.read_table(folder / "predictions.parquet")


def assert_equal(folder, reference):
    mine, wanted = outcome(folder), outcome(reference)
    assert mine[0].keys() == wanted[0].keys()
    for name, tensors in wanted[0].items():
        different = [key for key in tensors if tensors[key] != mine[0][name][key]]
        assert not different, (name, different)
    assert mine[1] == wanted[1]
    assert mine[2] == wanted[2]
    assert not list(folder.rglob("*.partial"))


def run_cells(cells, job, also=(), **how):
    """Each cell: one run without a stop; one with a SIGTERM in the middle of an epoch that goes on in new processes."""
    jobs = {(world, turn): [] for world in (1, 2) for turn in (1, 2)}
    for number, cell in enumerate(cells):
        jobs[cell[-1], 1] += [job(cell, "whole"), job(cell, "stopped", stop_after=4 + number % 5)]
        jobs[cell[-1], 2].append(job(cell, "stopped", resume="auto"))
    for world, turn, extra in also:
        jobs[world, turn].append(extra)
    batches = [(world, jobs[world, turn]) for turn in (1, 2) for world in (1, 2) if jobs[world, turn]]
    printed = [launch(world, batch, 2500, **how) for world, batch in batches]
    for cell in cells:
        assert_equal(job(cell, "stopped")[2], job(cell, "whole")[2])
    return "".join(printed)


def test_stopped_runs_equal_whole_ones_and_other_processes_keep_the_rows_of_each_step(job, forks, tmp_path):
    """Beside two cells: two processes begin and one goes on, with losses equal but for rounding."""
    cell = ("text", "full", 0, 1, 2)
    quiet = {"model.dropout": 0.0, "adapt.batch_norm": "frozen"}  # nothing random
    began = [job(cell, "whole", **quiet), job(cell, "stopped", stop_after=5, **quiet)]
    goes_on = job(cell, "stopped", resume="auto", **quiet)
    also = [*((2, 1, each) for each in began), (1, 2, goes_on)]
    said = run_cells(sorted(FAST), job, also, forks=forks, logs=tmp_path)
    assert "(of 2 process(es): same rows in the same steps, other rounding)" in said
    whole, other = (
        [json.loads(line) for line in (each[2] / "history.jsonl").read_text().splitlines()]
        for each in (began[0], goes_on)
    )
    assert [record["step"] for record in whole] == [record["step"] for record in other]
    for mine, wanted in zip(other, whole, strict=True):
        assert mine.get("train/loss", 0.0) == pytest.approx(wanted.get("train/loss", 0.0), rel=1e-3)
        assert mine.get("lr/head") == wanted.get("lr/head")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_runs_equal_whole_ones_in_every_cell(kind, job):
    cells = [cell for cell in CELLS if cell[0] == kind]
    run_cells(cells, job)
    print(f"\nresume: {len(cells)} cells of {kind} bitwise equal ({len(CELLS)} in all)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_each_step_equals_a_whole_one(kind, job):
    cell = (kind, "full", 0, 1, 1)
    launch(1, [job(cell, "whole")])
    for step in range(1, 14):  # the last one: all steps are done, and an evaluation is owed
        launch(1, [job(cell, "stopped", stop_after=step, resume="auto")])
    launch(1, [job(cell, "stopped", resume="auto")])
    assert_equal(job(cell, "stopped")[2], job(cell, "whole")[2])
