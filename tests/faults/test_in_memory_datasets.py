# ruff: noqa: E501  (a line of the launched program)
"""In-memory datasets and streams of rows; references: files, and one process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset
from PIL import Image as PILImage

import hftl
from hftl.config.schema import DataConfig
from hftl.data.source import load_splits
from hftl.errors import ConfigError, DataError
from hftl.tasks.registry import ImageClassification, TextClassification

JOB = """
import sys, json, hftl
from pathlib import Path

name, model, out = sys.argv[1:]
words = ["cat dog", "bread rice", "saw hammer"]
read = {}

def stream(split, count):
    for number in range(count):
        read[split] = read.get(split, 0) + 1
        yield {"text": f"the {words[number % 3]} " * (1 + number % 5), "label": "xyz"[number % 3], "id": number}

rows = {"train": stream("train", 1003), "dev": stream("dev", 101), "test": stream("test", 333)}
run = hftl.RunConfig(
    model=hftl.ModelConfig(name=model),
    adapt=hftl.AdaptConfig(method="frozen"),
    train=hftl.TrainConfig(max_steps=3, lr=0.0, head_lr=0.0, batch_size_per_device=16, trackers=[], seed=0),
    output_dir=out,
)
run, splits, task = hftl.setup_run(run, hftl.TextClassification, rows=rows)
accelerator = hftl.create_accelerator(run)
model = hftl.build_model(run, task.head)
report = hftl.adapt(model, run.adapt)
history = hftl.fit(accelerator, model, task, splits, run)
metrics = hftl.evaluate(accelerator, model, task, splits, run, Path(out) / "predictions.parquet")
hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
from hftl.data.layouts.in_memory import _launch_id
train = splits["train"]
facts = {"launch": _launch_id(), "read": read, "ids": train["id"][:], "fingerprint": train._fingerprint, "source": run.data.source}
(Path(out) / f"process{accelerator.process_index}.json").write_text(json.dumps(facts))
accelerator.wait_for_everyone()
from hftl.logging import leave_process_group
leave_process_group()
"""


@pytest.fixture(scope="module")
def launched(tiny_bert, tmp_path_factory):
    """Run folders of a stream of 1,003 training rows on one process (`1`) and on two (`2`)."""
    import os
    import socket

    root = tmp_path_factory.mktemp("streams")
    (root / "job.py").write_text(JOB)
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(world),
            "--master_port",
            port,
        ]
        completed = subprocess.run(
            [*launcher, str(root / "job.py"), "job", tiny_bert, str(root / str(world))],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            },
        )
        assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-4000:]
    return root


@pytest.mark.slow
def test_stream_on_two_processes_matches_one(launched):
    facts = {world: json.loads((launched / world / "report.json").read_text()) for world in "12"}
    assert facts["1"]["rows"] == facts["2"]["rows"] == {"train": 1003, "validation": 101, "test": 333}
    metrics = {world: json.loads((launched / world / "metrics.json").read_text()) for world in "12"}
    assert metrics["1"].keys() == metrics["2"].keys()
    for name, value in metrics["1"].items():
        assert metrics["2"][name] == pytest.approx(value, abs=1e-6), name
    tables = [pq.read_table(launched / world / "predictions.parquet").to_pylist() for world in "12"]
    assert [(row["split"], row["row"], row["prediction"]) for row in tables[0]] == [
        (row["split"], row["row"], row["prediction"]) for row in tables[1]
    ]


@pytest.mark.slow
def test_stream_rows_are_read_once_by_one_process(launched):
    processes = [json.loads((launched / "2" / f"process{number}.json").read_text()) for number in (0, 1)]
    assert processes[0]["launch"] == processes[1]["launch"]
    for process in processes:
        assert process["ids"] == list(range(1003)) and process["source"] == "python:rows"
    # one process reads all rows of a split, the other none
    for split, count in {"train": 1003, "dev": 101, "test": 333}.items():
        assert sorted(process["read"].get(split, 0) for process in processes) == [0, count]
    expected = json.loads((launched / "1/process0.json").read_text())["fingerprint"]
    assert processes[0]["fingerprint"] == processes[1]["fingerprint"] == expected


@pytest.mark.slow
def test_evaluate_rejects_source_of_python_rows(launched, texts):
    from hftl.inference.batch_inference import evaluate_saved
    from hftl.reporting import write_report

    with pytest.raises(DataError, match="'python:rows' are rows passed from Python and cannot be reopened by name"):
        evaluate_saved(str(launched / "1"))
    page = write_report(launched / "1", launched / "again.html").read_text()
    assert "passed from Python" in page
    assert hftl.load(launched / "1").predict(["the cat"])[0]["prediction"] in "xyz"


def make_rows(count, **columns):
    return ({"text": f"row {number}", "label": "ab"[number % 2], **columns} for number in range(count))


def load(rows, **options):
    return load_splits(DataConfig(**{"validation_fraction": 0.0} | options), rows=rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_rows(5),
        lambda: list(make_rows(5)),
        lambda: {"train": make_rows(5)},
        lambda: {"training": Dataset.from_list(list(make_rows(5)))},
        lambda: DatasetDict(train=Dataset.from_list(list(make_rows(5)))),
        lambda: {"train": IterableDataset.from_generator(make_rows, gen_kwargs={"count": 5})},
    ],
)
def test_load_splits_accepts_rows_in_many_forms(make, capsys):
    splits = load(make())
    assert splits["train"].to_list() == list(make_rows(5)) and list(splits) == ["train"]
    assert TextClassification(splits).head.labels == ("a", "b")


def test_validation_split_of_stream_matches_file(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(100)))
    from_file = load_splits(DataConfig(source=str(tmp_path), validation_fraction=0.2))
    from_stream = load(make_rows(100), validation_fraction=0.2)
    assert {split: rows.to_list() for split, rows in from_stream.items()} == {
        split: rows.to_list() for split, rows in from_file.items()
    }


def test_stream_preserves_image_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})

    def stream():
        for number, image in enumerate(pixels):
            yield {"image": PILImage.fromarray(image), "label": number % 2}

    for train in (stream(), IterableDataset.from_generator(stream, features=features)):
        splits = load({"train": train})
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(splits["train"]["image"], pixels, strict=True))
        ImageClassification(splits)


def test_python_rows_accept_any_path_and_reject_urls(tmp_path, monkeypatch):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    splits = load([{"image": "a.png", "label": 0}, {"image": str(tmp_path / "a.png"), "label": 1}])
    assert [image.size for image in splits["train"]["image"]] == [(8, 8)] * 2
    with pytest.raises(DataError, match="row 1 .* is a URL"):
        load([{"image": "a.png", "label": 0}, {"image": "http://metadata.invalid/a.png", "label": 1}])


def failing_rows():
    yield from make_rows(3)
    raise RuntimeError("connection lost")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: failing_rows(), "'train' failed after 3 row(s): RuntimeError: connection lost"),
        (lambda: [*make_rows(3), "text"], "row 3 of 'train' is of type str, not a mapping"),
        (lambda: [*make_rows(1000), {"text": "x", "label": "a", "more": 1}], "row 1000 of 'train' has column(s) more"),
        (
            lambda: [*make_rows(1000, n=1), {"text": "x", "label": "a", "n": "one"}],
            "rows 1000 to 1000 of 'train' have a column of mixed types",
        ),
        (lambda: {"train": "text"}, "'train' is of type str. Pass a datasets.Dataset or an iterable"),
        (lambda: {"train": 3}, "'train' is of type int. Pass"),
        (lambda: [], "has no rows (splits found: none)"),
        (lambda: {"test": make_rows(3)}, "has no training rows (splits found: test)"),
    ],
)
def test_invalid_python_rows_raise_with_row_number(make, reason):
    with pytest.raises(DataError) as caught:
        load(make())
    assert reason in str(caught.value)


def test_setup_run_collects_row_problems_with_others(text_run):
    run = replace(text_run(batch_size_per_device=0), data=DataConfig(source="my rows"))
    with pytest.raises(ConfigError) as caught:
        hftl.setup_run(run, TextClassification, rows=failing_rows())
    assert len(caught.value.problems) == 2 and "train.batch_size_per_device" in str(caught.value)


def test_stream_cache_is_removed_at_exit():
    code = (
        "from hftl.data.layouts.in_memory import dataset_from_rows\n"
        "rows = dataset_from_rows([{'text': 'a', 'label': 'b'}])['train']\n"
        "print(rows.cache_files[0]['filename'])"
    )
    from conftest import run_python

    assert not Path(run_python(code).strip().splitlines()[-1]).exists()
