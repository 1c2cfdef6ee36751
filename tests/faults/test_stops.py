"""Stops between the steps, and two processes that meet in one run folder."""

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


def test_a_stop_breaks_an_evaluation_off_and_the_next_run_makes_it_first(text_run, monkeypatch, tmp_path):
    """Bitwise as without the stop: the evaluation was owed, and is made with the same weights."""
    from hftl.evaluation import evaluate

    monkeypatch.setattr(evaluate, "_GATHER_EVERY", 1)
    run = text_run("full", num_epochs=2, batch_size_per_device=4, eval_steps=5)
    run_undrawn("text_classification", replace(run, output_dir=str(tmp_path / "whole")))
    predict, seen = evaluate.predict, []

    def asked_in_the_middle(accelerator, model, batches):
        for number, found in enumerate(predict(accelerator, model, batches)):
            if number == 0 and not seen:
                seen.append(os.kill(os.getpid(), signal.SIGTERM))
            yield found

    monkeypatch.setattr(evaluate, "predict", asked_in_the_middle)
    stopped = replace(run, output_dir=str(tmp_path / "stopped"), resume="auto")
    with pytest.raises(Stopped, match=r"stopped \(SIGTERM\) after step 5 of 30"):
        run_undrawn("text_classification", stopped)
    records = (tmp_path / "stopped" / "history.jsonl").read_text().splitlines()
    assert not any("validation" in line for line in records)
    run_undrawn("text_classification", stopped)
    for name in ("history.jsonl", "metrics.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    with pytest.raises(RunComplete):
        run_undrawn("text_classification", stopped)


def test_two_processes_do_not_train_in_one_folder(text_run, tmp_path):
    run = text_run("full", max_steps=2)
    folder = tmp_path / "run"
    folder.mkdir()
    hold = "import sys; from pathlib import Path; from hftl.run_folder.folder import hold; hold(Path(sys.argv[1]));"
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True); sys.stdin.read()", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENV},
        cwd=ROOT,
    )
    assert other.stdout.readline() == b"held\n"
    run, _, _ = hftl.setup_run(run, hftl.TextClassification)
    with pytest.raises(ConfigError, match="another process trains in"):
        hftl.create_accelerator(run)
    other.kill()
    other.wait()
    hftl.create_accelerator(run)


def test_a_run_that_was_to_be_pushed_is_not_complete_before_it_is(text_run, tmp_path):
    from hftl.run_folder.folder import PUSHED, finished_metrics

    run = text_run("frozen", max_steps=2)
    run_undrawn("text_classification", run)
    wants = replace(run, hub=hftl.HubConfig(repo_id="me/model"))
    assert finished_metrics(run) is not None and finished_metrics(wants) is None
    (tmp_path / "run" / PUSHED).write_text(json.dumps({"me/model": "commit"}))
    assert finished_metrics(wants) == finished_metrics(run)


def test_without_validation_all_processes_end_with_the_statistics_that_are_saved(images, tiny_timm, forks, tmp_path):
    from launch import flags, launch
    from safetensors.torch import load_file

    more = {"train.max_steps": 4, "train.batch_size_per_device": 8, "data.validation_fraction": 0}
    bare = tmp_path / "data"
    bare.mkdir()
    for split in ("train", "test"):
        (bare / split).symlink_to(images / split)
    chosen = flags(bare, tiny_timm["test_resnet"], tmp_path / "run", adapt__batch_norm="train", **more)
    job = ("faulty", {"recipe": "image_classification", "flags": chosen}, tmp_path)
    launch(2, [job], forks=forks, logs=tmp_path / "logs")
    mine, other = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
