"""Resume of runs on pairs, bitwise identical: text pairs, and image-text pairs on cached embeddings."""

from dataclasses import replace

import pytest
from conftest import run_undrawn
from launch import stopping_after
from pair_data import captioned, positive_pairs, write_lines
from safetensors.torch import load_file

import hftl
from hftl.errors import Stopped


@pytest.mark.parametrize("task", ["text_embedding", pytest.param("image_text_retrieval", marks=pytest.mark.slow)])
def test_resumed_pair_run_matches_uninterrupted_run(task, tiny_bert, tiny_timm, tmp_path):
    if task == "text_embedding":
        source = write_lines(tmp_path / "data", train=positive_pairs(24), validation=positive_pairs(6, 1))
        model, method = hftl.ModelConfig(name=tiny_bert), "full"
    else:
        images = tmp_path / "data" / "images"
        rows = {"train": captioned(images, 24), "validation": captioned(images, 6, seed=1)}
        source = write_lines(tmp_path / "data", **rows)
        model, method = hftl.ModelConfig(name=tiny_timm["test_resnet"], text_name=tiny_bert), "frozen"
    run = hftl.RunConfig(
        hftl.DataConfig(source=source),
        model,
        hftl.AdaptConfig(method=method),
        hftl.TrainConfig(max_steps=4, eval_steps=2, lr=1e-3, head_lr=1e-2, batch_size_per_device=8, trackers=[]),
        output_dir=str(tmp_path / "reference"),
    )
    metrics = run_undrawn(task, run)
    run = replace(run, output_dir=str(tmp_path / "stopped"), resume="auto")
    with stopping_after(2), pytest.raises(Stopped):
        run_undrawn(task, run)
    assert run_undrawn(task, run) == metrics
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("reference", "stopped"))
    assert all((first[name] == second[name]).all() for name in first)
