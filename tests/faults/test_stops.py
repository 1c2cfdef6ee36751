"""Stop signals during evaluation, locking of the run folder, and completed runs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_undrawn
from launch import ENV, ROOT

import hftl
from hftl.errors import ConfigError, RunComplete, Stopped


def test_resume_runs_interrupted_evaluation_first(text_run, monkeypatch, tmp_path):
    """Bitwise identical to the uninterrupted run: the pending evaluation uses the same weights."""
    from hftl.evaluation import evaluate

    monkeypatch.setattr(evaluate, "_GATHER_EVERY", 1)
    run = text_run("full", num_epochs=2, batch_size_per_device=4, eval_steps=5)
    run_undrawn("text_classification", replace(run, output_dir=str(tmp_path / "reference")))
    predict, signals = evaluate.predict, []

    def predict_with_signal(accelerator, model, batches):
        for number, prediction in enumerate(predict(accelerator, model, batches)):
            if number == 0 and not signals:
                signals.append(os.kill(os.getpid(), signal.SIGTERM))
            yield prediction

    monkeypatch.setattr(evaluate, "predict", predict_with_signal)
    stopped = replace(run, output_dir=str(tmp_path / "stopped"), resume="auto")
    with pytest.raises(Stopped, match=r"stopped \(SIGTERM\) after step 5 of 30"):
        run_undrawn("text_classification", stopped)
    records = (tmp_path / "stopped" / "history.jsonl").read_text().splitlines()
    assert not any("validation" in line for line in records)
    run_undrawn("text_classification", stopped)
    for name in ("history.jsonl", "metrics.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "reference" / name).read_text()
    with pytest.raises(RunComplete):
        run_undrawn("text_classification", stopped)


def test_create_accelerator_rejects_locked_run_folder(text_run, tmp_path):
    run = text_run("full", max_steps=2)
    folder = tmp_path / "run"
    folder.mkdir()
    lock = "import sys; from pathlib import Path; from hftl.run_folder.folder import hold; hold(Path(sys.argv[1]));"
    process = subprocess.Popen(
        [sys.executable, "-c", lock + "print('locked', flush=True); sys.stdin.read()", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENV},
        cwd=ROOT,
    )
    assert process.stdout.readline() == b"locked\n"
    run, _, _ = hftl.setup_run(run, hftl.TextClassification)
    with pytest.raises(ConfigError, match="another process is training in"):
        hftl.create_accelerator(run)
    process.kill()
    process.wait()
    hftl.create_accelerator(run)


def test_finished_metrics_before_push_returns_none(text_run, tmp_path):
    from hftl.run_folder.folder import PUSHED, finished_metrics

    run = text_run("frozen", max_steps=2)
    run_undrawn("text_classification", run)
    pushed = replace(run, hub=hftl.HubConfig(repo_id="me/model"))
    assert finished_metrics(run) is not None and finished_metrics(pushed) is None
    (tmp_path / "run" / PUSHED).write_text(json.dumps({"me/model": "commit"}))
    assert finished_metrics(pushed) == finished_metrics(run)


def test_fit_without_validation_shares_running_statistics(images, tiny_timm, forks, tmp_path):
    from launch import flags, launch
    from safetensors.torch import load_file

    settings = {"train.max_steps": 4, "train.batch_size_per_device": 8, "data.validation_fraction": 0}
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / split).symlink_to(images / split)
    arguments = flags(data, tiny_timm["test_resnet"], tmp_path / "run", adapt__batch_norm="train", **settings)
    job = ("faulty", {"recipe": "image_classification", "flags": arguments}, tmp_path)
    launch(2, [job], forks=forks, logs=tmp_path / "logs")
    first, second = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
