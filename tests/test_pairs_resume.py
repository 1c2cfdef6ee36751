"""Trainings on pairs that were stopped go on bit for bit: texts, and images and texts on vectors computed once."""

from dataclasses import replace

import pytest
from conftest import run_undrawn
from launch import stopping_after
from pair_data import captioned, positive_pairs, write_lines
from safetensors.torch import load_file

import hftl
from hftl.errors import Stopped


@pytest.mark.parametrize("task", ["text_embedding", pytest.param("image_text_retrieval", marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on(task, tiny_bert, tiny_timm, tmp_path):
    if task == "text_embedding":
        source = write_lines(tmp_path / "data", train=positive_pairs(24), validation=positive_pairs(6, 1))
        model, method = hftl.ModelConfig(name=tiny_bert), "full"
    else:
        pictures = tmp_path / "data" / "images"
        rows = {"train": captioned(pictures, 24), "validation": captioned(pictures, 6, seed=1)}
        source = write_lines(tmp_path / "data", **rows)
        model, method = hftl.ModelConfig(name=tiny_timm["test_resnet"], text_name=tiny_bert), "frozen"
    run = hftl.RunConfig(
        hftl.DataConfig(source=source),
        model,
        hftl.AdaptConfig(method=method),
        hftl.TrainConfig(max_steps=4, eval_steps=2, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[]),
        output_dir=str(tmp_path / "whole"),
    )
    whole = run_undrawn(task, run)
    run = replace(run, output_dir=str(tmp_path / "stopped"), resume="auto")
    with stopping_after(2), pytest.raises(Stopped):
        run_undrawn(task, run)
    assert run_undrawn(task, run) == whole
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all((first[name] == second[name]).all() for name in first)
