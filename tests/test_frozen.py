"""Head search on cached features: compared with the training loop and torch.optim.AdamW; selection and fallbacks."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from launch import ENV, flags
from safetensors.torch import load_file

import hftl
from hftl.config.schema import FrozenConfig
from hftl.errors import CheckpointError, ConfigError, FeatureError, NonfiniteError, Stopped
from hftl.features.extractor import linear_head
from hftl.heads.batched_heads import BatchedHeads, HeadSetting
from hftl.training.head_search import HEADS

SINGLE_HEAD = FrozenConfig(lr_factors=[1.0], weight_decays=[0.01])


def train_head(run, task_class, frozen=SINGLE_HEAD, folder="run", **data):
    """Trains with the functions of a recipe, and returns weight and bias of the head, the history, and the run."""
    output = str(Path(run.output_dir).parent / folder)
    run = replace(run, adapt=replace(run.adapt, frozen=frozen), data=replace(run.data, **data), output_dir=output)
    run, splits, task = hftl.setup_run(run, task_class)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    head = linear_head(model)
    assert head is not None
    return head.weight.detach().clone(), head.bias.detach().clone(), history, run


def assert_same_head(first, second, tolerance=1e-5):
    assert max(float((a - b).abs().max()) for a, b in zip(first[:2], second[:2], strict=True)) < tolerance


def test_text_head_matches_training_loop(text_run):
    run = text_run("frozen", "mean", num_epochs=2)
    cached = train_head(run, hftl.TextClassification)
    loop = train_head(run, hftl.TextClassification, FrozenConfig(cache=False), "loop")
    assert_same_head(cached, loop)
    assert cached[2].best["step"] == loop[2].best["step"] and cached[2].steps == loop[2].steps
    assert Path(cached[3].output_dir, HEADS).is_file() and not Path(loop[3].output_dir, HEADS).exists()
    records = (cached[2].records, loop[2].records)
    losses = [[row["validation/loss"] for row in rows if "validation/loss" in row] for rows in records]
    assert np.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize("net", ["test_resnet", "test_vit"])
def test_image_head_with_views_matches_training_loop(net, image_run):
    run = image_run(net, "frozen", num_epochs=2)
    cached = train_head(run, hftl.ImageClassification, replace(SINGLE_HEAD, num_views=2))
    loop = train_head(run, hftl.ImageClassification, FrozenConfig(cache=False), "loop")
    assert_same_head(cached, loop)
    no_views = train_head(run, hftl.ImageClassification, SINGLE_HEAD, "no_views")
    assert float((no_views[0] - cached[0]).abs().max()) > 1e-3, "images are augmented only with views"


def test_batched_heads_match_adamw_per_head():
    torch.manual_seed(0)
    rows, labels = torch.randn(12, 3, 8, 5), torch.randint(0, 4, (12, 3, 8))
    head = torch.nn.Linear(5, 4)
    settings = [HeadSetting(lr, decay, seed) for seed in (7, 8, 9) for decay in (0.0, 0.3) for lr in (1e-3, 0.3)]
    heads = BatchedHeads(head, settings, 0.4, torch.device("cpu"))
    initial = [heads.copy_of(number) for number in range(len(settings))]
    assert torch.equal(initial[0][0], head.weight) and not torch.equal(initial[4][0], initial[8][0])

    def losses(logits, labels):
        head_labels = labels.repeat_interleave(len(settings) // 3, 0).flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), head_labels, reduction="none").view(12, 8)

    uniform = torch.full((3, 8), 1 / 8)
    for step in range(12):
        heads.step(rows[step], uniform, lambda logits, step=step: losses(logits, labels[step]), 1 / (step + 1))
    for number, setting in enumerate(settings):
        reference = torch.nn.Linear(5, 4)
        with torch.no_grad():
            reference.weight.copy_(initial[number][0])
            reference.bias.copy_(initial[number][1])
        groups = [
            {"params": [reference.weight], "weight_decay": setting.weight_decay},
            {"params": [reference.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=setting.lr)
        for step in range(12):
            seed = number // 4
            loss = torch.nn.functional.cross_entropy(reference(rows[step, seed]), labels[step, seed])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.4)
            for group in optimizer.param_groups:
                group["lr"] = setting.lr / (step + 1)
            optimizer.step()
        weight, bias = heads.copy_of(number)
        assert torch.allclose(weight, reference.weight, atol=2e-6) and torch.allclose(bias, reference.bias, atol=2e-6)


def test_head_search_selects_on_validation_and_matches_single(text_run):
    run = text_run("frozen", "mean", num_epochs=3)
    grid = FrozenConfig(lr_factors=[1.0, 30.0, 1e-3], weight_decays=[0.01, 1.0], num_seeds=2)
    *selected, history, finished = train_head(run, hftl.TextClassification, grid)
    table = json.loads(Path(finished.output_dir, HEADS).read_text())
    assert len(table) == 12 and sum(row["kept"] for row in table) == 1
    best = next(row for row in table if row["kept"])
    assert best["accuracy"] == history.best["value"]
    top = max(row["accuracy"] for row in table)
    error = math.sqrt((top * 12 + 2) / 16 * (1 - (top * 12 + 2) / 16) / 12)
    within_error = [row for row in table if row["accuracy"] >= top - error]
    distances = [abs(math.log(row["lr"] / finished.train.head_lr)) for row in within_error]
    assert abs(math.log(best["lr"] / finished.train.head_lr)) == min(distances)
    best_only = FrozenConfig(
        lr_factors=[best["lr"] / finished.train.head_lr], weight_decays=[best["weight_decay"]], num_seeds=2
    )
    single = train_head(run, hftl.TextClassification, best_only, "single")
    if single[2].best["value"] == best["accuracy"]:
        assert_same_head(selected, single)
    assert len({row["loss"] for row in table}) == 12, "all heads differ"


def test_head_search_skips_diverged_heads_or_raises(text_run):
    run = text_run("frozen", "mean", num_epochs=2)
    grid = replace(SINGLE_HEAD, lr_factors=[1.0, 1e40])
    *_, finished = train_head(run, hftl.TextClassification, grid)
    rows = json.loads(Path(finished.output_dir, HEADS).read_text())
    assert [row["kept"] for row in rows] == [True, False]
    with pytest.raises(NonfiniteError, match="no head has a finite loss"):
        train_head(run, hftl.TextClassification, replace(SINGLE_HEAD, lr_factors=[1e40]), "all")


@pytest.mark.parametrize(("pooling", "dropout"), [("default", 0.1), ("mean", 0.2)])
def test_dropout_before_head_skips_cache_and_logs(pooling, dropout, text_run, capsys):
    run = text_run("frozen", pooling)
    run = replace(run, model=replace(run.model, dropout=dropout))
    run, splits, task = hftl.setup_run(run, hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    assert history.steps and not Path(run.output_dir, HEADS).exists()
    assert f"dropout ({dropout:g}) before the head" in capsys.readouterr().out


class WeightedClassification(hftl.TextClassification):
    """Task whose loss uses a row weight from the batch."""

    def collate(self, examples):
        batch = super().collate(examples)
        return batch | {"row_weight": torch.full((len(examples),), 0.5)}

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * batch["row_weight"]


def test_loss_with_extra_batch_entries_skips_cache(text_run, capsys):
    *_, history, finished = train_head(text_run("frozen", "mean"), WeightedClassification, FrozenConfig())
    assert history.steps and not Path(finished.output_dir, HEADS).exists()
    assert "other than inputs and labels (inputs, labels, row_weight)" in capsys.readouterr().out


def test_logits_beyond_linear_head_skip_cache(text_run, monkeypatch, capsys):
    from hftl.models.text_model import TextModel

    forward = TextModel.forward
    monkeypatch.setattr(TextModel, "forward", lambda self, inputs: {"logits": 2 * forward(self, inputs)["logits"]})
    *_, finished = train_head(text_run("frozen", "mean"), hftl.TextClassification, FrozenConfig())
    output = capsys.readouterr().out
    assert not Path(finished.output_dir, HEADS).exists() and "not the output of the linear layer" in output


@pytest.mark.parametrize("invalid", [{"lr_factors": []}, {"lr_factors": [-1.0]}, {"weight_decays": []}])
def test_setup_rejects_invalid_grid(invalid, text_run):
    run = text_run("frozen", "mean")
    run = replace(run, adapt=replace(run.adapt, frozen=FrozenConfig(**invalid)))
    with pytest.raises(ConfigError, match=f"adapt.frozen.{next(iter(invalid))}.*at least one number"):
        hftl.setup_run(run, hftl.TextClassification)


def test_no_validation_trains_default_setting_only(text_run):
    run = text_run("frozen", "mean")
    train_only = {"validation_fraction": 0.0, "source": str(Path(run.data.source, "train.csv"))}
    *_, history, finished = train_head(run, hftl.TextClassification, FrozenConfig(), **train_only)
    assert not history.best and history.steps
    assert json.loads(Path(finished.output_dir, HEADS).read_text()) == []


def test_nonfinite_features_raise_with_row_numbers(text_run, monkeypatch):
    from hftl.models.text_model import TextModel

    forward = TextModel.forward

    def nonfinite_forward(self, inputs):
        self.net.backbone.embeddings.word_embeddings.weight.data[5] = float("nan")
        return forward(self, inputs)

    monkeypatch.setattr(TextModel, "forward", nonfinite_forward)
    with pytest.raises(FeatureError, match=r"NaN or infinite values for train row\(s\) \d"):
        # max_length differs from other tests, so that no features are cached
        train_head(text_run("frozen", "mean"), hftl.TextClassification, max_length=11)


def test_stopped_head_search_resume_matches_uninterrupted_run(text_run, monkeypatch):
    run = text_run("frozen", "mean", num_epochs=2)
    uninterrupted = train_head(run, hftl.TextClassification, FrozenConfig(), "uninterrupted")
    step, calls = BatchedHeads.step, []

    def step_with_signal(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(BatchedHeads, "step", step_with_signal)
    run = replace(run, resume="auto")
    with pytest.raises(Stopped, match="after step 5 of 16 of the head") as caught:
        train_head(run, hftl.TextClassification, FrozenConfig(), "stopped")
    assert caught.value.exit_code == 75
    resumed = train_head(run, hftl.TextClassification, FrozenConfig(), "stopped")
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted[:2], resumed[:2], strict=True))
    assert resumed[2].records == uninterrupted[2].records and resumed[2].best == uninterrupted[2].best


def test_full_disk_during_history_write_raises(text_run, monkeypatch):
    from hftl.run_folder.history import Recorder

    def open_full_device(self):
        self.file = open("/dev/full", "w")

    monkeypatch.setattr(Recorder, "_begin", open_full_device)
    with pytest.raises(CheckpointError, match="No space left"):
        train_head(text_run("frozen", "mean"), hftl.TextClassification)


def test_two_processes_match_single_process_head(texts, tiny_bert, tmp_path, forks):
    settings = {"model.pooling": "mean", "train.num_epochs": 2, "train.head_lr": 1e-2, "train.trackers": "[]"}
    for world in (1, 2):
        folder = tmp_path / f"on{world}"
        arguments = flags(texts, tiny_bert, folder, "frozen", **settings, **{"train.batch_size_per_device": 8 // world})
        environment = {"HFTL_CACHE": str(tmp_path / f"cache{world}")}
        command = ["python", ROOT / "recipes" / "text_classification.py", *arguments]
        statuses, output = forks.command(command, tmp_path, 120, world, **ENV, **environment)
        assert statuses == [0] * world, output[-3000:]
    first, second = (load_file(tmp_path / f"on{world}" / "model" / "model.safetensors") for world in (1, 2))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    tables = [json.loads((tmp_path / f"on{world}" / HEADS).read_text()) for world in (1, 2)]
    assert [row["kept"] for row in tables[0]] == [row["kept"] for row in tables[1]]
