"""Losses over rows of all processes: two have the gradient of one with the whole batch, and evaluate as one."""

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
    """A folder with the results of all jobs on one process (`1/NAME`) and on two (`2/NAME`); 27 training rows."""
    root = tmp_path_factory.mktemp("pairs")
    sources = {
        "positives": write_lines(root / "positives", train=positive_pairs(27), test=positive_pairs(13, 1)),
        "cosent": write_lines(root / "scored", train=scored_pairs(27), test=scored_pairs(13, 1)),
    }
    pictures = root / "captioned" / "images"
    rows = {"train": captioned(pictures, 27, lists=True), "test": captioned(pictures, 13, lists=True, seed=1)}
    sources["siglip"] = write_lines(root / "captioned", **rows)
    models = {"text_embedding": tiny_bert, "image_text_retrieval": tiny_timm["test_resnet"]}
    common = {"model.text_name": tiny_bert, "model.dropout": 0.0, "train.seed": 1, "train.logging_steps": 1}
    common |= {"train.max_grad_norm": 0, "train.freeze_backbone_ratio": 0, "data.validation_fraction": 0}
    learning = {"train.max_steps": 2, "train.lr": 1e-3, "train.head_lr": 1e-3}
    still = {"train.max_steps": 1, "train.lr": 0, "train.head_lr": 0, "train.weight_decay": 0}
    for world in (1, 2):
        jobs = []
        for name, (task, options) in GRADIENTS.items():
            out, settings = root / str(world) / name, common | options | learning
            settings["train.batch_size_per_device"] = 8 // world
            chosen = flags(sources[name], models[task], out / "run", **settings)
            jobs.append(("gradient", {"recipe": task, "flags": chosen}, out))
        out, settings = root / str(world) / "evaluated", common | options | still | {"train.batch_size_per_device": 4}
        chosen = flags(sources[name], models[task], out / "run", **settings)
        jobs.append(("recipe", {"recipe": task, "flags": chosen}, out))
        launch(world, jobs, forks=forks, logs=root / "logs")
    return root


@pytest.mark.parametrize("name", GRADIENTS)
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(name, launched):
    """Steps of 7, 7, 7 and 6 rows: uneven shares. Negatives of the other process count, and so do their gradients."""
    for step in (0, 1):
        one, two = (load_file(launched / str(world) / name / f"step{step}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        largest = max(float(value.abs().max()) for value in one.values())
        for key, wanted in one.items():
            scale = max(float(wanted.abs().max()), 1e-2 * largest)
            torch.testing.assert_close(
                two[key], wanted, atol=1e-3 * scale, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_two_processes_evaluate_as_one(launched):
    """Same weights (zero rates), 13 rows in batches of 4: nothing is gathered, metrics and predictions are equal."""
    found = {}
    for world in (1, 2):
        run = launched / str(world) / "evaluated" / "run"
        rows = pq.read_table(run / "predictions.parquet").to_pylist()
        found[world] = json.loads((run / "metrics.json").read_text()), rows
    assert found[1] == found[2]
    assert len(found[1][1]) == 13
