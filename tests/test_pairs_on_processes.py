"""Pair losses over the rows of all processes: gradients and evaluation on two processes match one."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from launch import flags, launch
from pair_data import captioned, positive_pairs, scored_pairs, write_lines
from safetensors.torch import load_file

GRADIENTS = {
    "positives": ("text_embedding", {}),
    "cosent": ("text_embedding", {"train.pair_loss": "cosent"}),
    "siglip": ("image_text_retrieval", {"train.pair_loss": "siglip"}),
}


@pytest.fixture(scope="module")
def launched(tiny_bert, tiny_timm, forks, tmp_path_factory):
    """Folder with the results of all jobs on one process (`1/NAME`) and on two (`2/NAME`); 27 training rows."""
    root = tmp_path_factory.mktemp("pairs")
    sources = {
        "positives": write_lines(root / "positives", train=positive_pairs(27), test=positive_pairs(13, 1)),
        "cosent": write_lines(root / "scored", train=scored_pairs(27), test=scored_pairs(13, 1)),
    }
    images = root / "captioned" / "images"
    rows = {"train": captioned(images, 27, lists=True), "test": captioned(images, 13, lists=True, seed=1)}
    sources["siglip"] = write_lines(root / "captioned", **rows)
    models = {"text_embedding": tiny_bert, "image_text_retrieval": tiny_timm["test_resnet"]}
    common = {"model.text_name": tiny_bert, "model.dropout": 0.0, "train.seed": 1, "train.logging_steps": 1}
    common |= {"train.max_grad_norm": 0, "train.freeze_backbone_ratio": 0, "data.validation_fraction": 0}
    trained = {"train.max_steps": 2, "train.lr": 1e-3, "train.head_lr": 1e-3}
    frozen = {"train.max_steps": 1, "train.lr": 0, "train.head_lr": 0, "train.weight_decay": 0}
    for world in (1, 2):
        jobs = []
        for name, (task, options) in GRADIENTS.items():
            out, settings = root / str(world) / name, common | options | trained
            settings["train.batch_size_per_device"] = 8 // world
            arguments = flags(sources[name], models[task], out / "run", **settings)
            jobs.append(("gradient", {"recipe": task, "flags": arguments}, out))
        out, settings = root / str(world) / "evaluated", common | options | frozen | {"train.batch_size_per_device": 4}
        arguments = flags(sources[name], models[task], out / "run", **settings)
        jobs.append(("recipe", {"recipe": task, "flags": arguments}, out))
        launch(world, jobs, forks=forks, logs=root / "logs")
    return root


@pytest.mark.parametrize("name", GRADIENTS)
def test_pair_loss_gradient_on_two_processes_matches_one(name, launched):
    """Uneven steps of 7, 7, 7 and 6 rows, with negatives of the other process and their gradients."""
    for step in (0, 1):
        one, two = (load_file(launched / str(world) / name / f"step{step}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        largest = max(float(value.abs().max()) for value in one.values())
        for key, expected in one.items():
            scale = max(float(expected.abs().max()), 1e-2 * largest)
            torch.testing.assert_close(
                two[key], expected, atol=1e-3 * scale, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_retrieval_evaluation_on_two_processes_matches_one(launched):
    """Same weights (learning rates 0), 13 rows in batches of 4: metrics and predictions are equal."""
    results = {}
    for world in (1, 2):
        run = launched / str(world) / "evaluated" / "run"
        rows = pq.read_table(run / "predictions.parquet").to_pylist()
        results[world] = json.loads((run / "metrics.json").read_text()), rows
    assert results[1] == results[2]
    assert len(results[1][1]) == 13
