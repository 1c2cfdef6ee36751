"""Heads on cached features: each ends where the plain loop would, whatever trains beside it, and the best is kept."""

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

ONE = FrozenConfig(lr_factors=[1.0], weight_decays=[0.01])


def trained(run, kind, frozen=ONE, folder="run", **data):
    """Returns weight and bias of the head after a run of the recipe's verbs, its history, and the run."""
    output = str(Path(run.output_dir).parent / folder)
    run = replace(run, adapt=replace(run.adapt, frozen=frozen), data=replace(run.data, **data), output_dir=output)
    run, splits, task = hftl.setup_run(run, kind)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    head = linear_head(model)
    assert head is not None
    return head.weight.detach().clone(), head.bias.detach().clone(), history, run


def same_head(first, second, tolerance=1e-5):
    assert max(float((a - b).abs().max()) for a, b in zip(first[:2], second[:2], strict=True)) < tolerance


def test_texts_end_where_the_plain_loop_does(text_run):
    run = text_run("frozen", "mean", num_epochs=2)
    cached = trained(run, hftl.TextClassification)
    plain = trained(run, hftl.TextClassification, FrozenConfig(cache=False), "plain")
    same_head(cached, plain)
    assert cached[2].best["step"] == plain[2].best["step"] and cached[2].steps == plain[2].steps
    assert Path(cached[3].output_dir, HEADS).is_file() and not Path(plain[3].output_dir, HEADS).exists()
    losses = [[r["validation/loss"] for r in each[2].records if "validation/loss" in r] for each in (cached, plain)]
    assert np.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize("net", ["test_resnet", "test_vit"])
def test_views_are_the_augmented_images_of_the_plain_loop(net, image_run):
    run = image_run(net, "frozen", num_epochs=2)
    cached = trained(run, hftl.ImageClassification, replace(ONE, views=2))
    plain = trained(run, hftl.ImageClassification, FrozenConfig(cache=False), "plain")
    same_head(cached, plain)
    still = trained(run, hftl.ImageClassification, ONE, "still")
    assert float((still[0] - cached[0]).abs().max()) > 1e-3, "without views, other images"


def test_a_bank_is_adamw_on_each_head_alone():
    torch.manual_seed(0)
    rows, labels = torch.randn(12, 3, 8, 5), torch.randint(0, 4, (12, 3, 8))
    head = torch.nn.Linear(5, 4)
    settings = [HeadSetting(lr, decay, seed) for seed in (7, 8, 9) for decay in (0.0, 0.3) for lr in (1e-3, 0.3)]
    bank = BatchedHeads(head, settings, 0.4, torch.device("cpu"))
    starts = [bank.copy_of(number) for number in range(len(settings))]
    assert torch.equal(starts[0][0], head.weight) and not torch.equal(starts[4][0], starts[8][0])

    def losses(logits, labels):
        of_each = labels.repeat_interleave(len(settings) // 3, 0)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), of_each.flatten(), reduction="none").view(12, 8)

    even = torch.full((3, 8), 1 / 8)
    for step in range(12):
        bank.step(rows[step], even, lambda logits, step=step: losses(logits, labels[step]), 1 / (step + 1))
    for number, setting in enumerate(settings):
        alone = torch.nn.Linear(5, 4)
        with torch.no_grad():
            alone.weight.copy_(starts[number][0])
            alone.bias.copy_(starts[number][1])
        groups = [
            {"params": [alone.weight], "weight_decay": setting.weight_decay},
            {"params": [alone.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=setting.lr)
        for step in range(12):
            of_seed = number // 4
            loss = torch.nn.functional.cross_entropy(alone(rows[step, of_seed]), labels[step, of_seed])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.4)
            for group in optimizer.param_groups:
                group["lr"] = setting.lr / (step + 1)
            optimizer.step()
        weight, bias = bank.copy_of(number)
        assert torch.allclose(weight, alone.weight, atol=2e-6) and torch.allclose(bias, alone.bias, atol=2e-6)


def test_heads_do_not_disturb_each_other_and_the_best_on_validation_is_kept(text_run):
    run = text_run("frozen", "mean", num_epochs=3)
    many = FrozenConfig(lr_factors=[1.0, 30.0, 1e-3], weight_decays=[0.01, 1.0], num_seeds=2)
    *kept, history, done = trained(run, hftl.TextClassification, many)
    table = json.loads(Path(done.output_dir, HEADS).read_text())
    assert len(table) == 12 and sum(row["kept"] for row in table) == 1
    best = next(row for row in table if row["kept"])
    assert best["accuracy"] == history.best["value"]
    top = max(row["accuracy"] for row in table)
    error = math.sqrt((top * 12 + 2) / 16 * (1 - (top * 12 + 2) / 16) / 12)
    close = [row for row in table if row["accuracy"] >= top - error]
    away = [abs(math.log(row["lr"] / done.train.head_lr)) for row in close]
    assert abs(math.log(best["lr"] / done.train.head_lr)) == min(away)
    alone = FrozenConfig(
        lr_factors=[best["lr"] / done.train.head_lr], weight_decays=[best["weight_decay"]], num_seeds=2
    )
    single = trained(run, hftl.TextClassification, alone, "alone")
    if single[2].best["value"] == best["accuracy"]:
        same_head(kept, single)
    assert len({row["loss"] for row in table}) == 12, "every head is another one"


def test_a_head_that_explodes_is_left_out_and_all_of_them_are_an_error(text_run):
    run = text_run("frozen", "mean", num_epochs=2)
    some = replace(ONE, lr_factors=[1.0, 1e40])
    *_, done = trained(run, hftl.TextClassification, some)
    rows = json.loads(Path(done.output_dir, HEADS).read_text())
    assert [row["kept"] for row in rows] == [True, False]
    with pytest.raises(NonfiniteError, match="no head has a finite loss"):
        trained(run, hftl.TextClassification, replace(ONE, lr_factors=[1e40]), "all")


@pytest.mark.parametrize(("pooling", "dropout"), [("default", 0.1), ("mean", 0.2)])
def test_what_cannot_be_cached_is_trained_plainly_and_said(pooling, dropout, text_run, capsys):
    run = text_run("frozen", pooling)
    trained_run = replace(run, model=replace(run.model, dropout=dropout))
    run, splits, task = hftl.setup_run(trained_run, hftl.TextClassification)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    history = hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    assert history.steps and not Path(run.output_dir, HEADS).exists()
    assert f"dropout ({dropout:g}) before the head" in capsys.readouterr().out


class Weighted(hftl.TextClassification):
    """Rows with a weight of their own, which its loss reads."""

    def collate(self, examples):
        batch = super().collate(examples)
        return batch | {"share": torch.full((len(examples),), 0.5)}

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * batch["share"]


def test_a_loss_that_reads_more_than_labels_is_trained_plainly(text_run, capsys):
    *_, history, done = trained(text_run("frozen", "mean"), Weighted, FrozenConfig())
    assert history.steps and not Path(done.output_dir, HEADS).exists()
    assert "other than inputs and labels (inputs, labels, share)" in capsys.readouterr().out


def test_logits_that_are_more_than_the_linear_layer_are_trained_plainly(text_run, monkeypatch, capsys):
    from hftl.models.text_model import TextModel

    plain = TextModel.forward
    monkeypatch.setattr(TextModel, "forward", lambda self, inputs: {"logits": 2 * plain(self, inputs)["logits"]})
    *_, done = trained(text_run("frozen", "mean"), hftl.TextClassification, FrozenConfig())
    assert not Path(done.output_dir, HEADS).exists() and "not the output of the linear layer" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"lr_factors": []}, {"lr_factors": [-1.0]}, {"weight_decays": []}])
def test_a_grid_that_makes_no_heads_is_refused(wrong, text_run):
    run = text_run("frozen", "mean")
    run = replace(run, adapt=replace(run.adapt, frozen=FrozenConfig(**wrong)))
    with pytest.raises(ConfigError, match=f"adapt.frozen.{next(iter(wrong))}.*at least one number"):
        hftl.setup_run(run, hftl.TextClassification)


def test_without_validation_the_plain_setting_is_trained(text_run):
    run = text_run("frozen", "mean")
    *_, history, done = trained(
        run, hftl.TextClassification, FrozenConfig(), validation_fraction=0.0, source=one_table(run)
    )
    assert not history.best and history.steps
    assert json.loads(Path(done.output_dir, HEADS).read_text()) == []


def one_table(run):
    return str(Path(run.data.source, "train.csv"))


def test_an_error_of_features_names_the_rows(text_run, monkeypatch):
    from hftl.models.text_model import TextModel

    plain = TextModel.forward

    def broken(self, inputs):
        self.net.backbone.embeddings.word_embeddings.weight.data[5] = float("nan")
        return plain(self, inputs)

    monkeypatch.setattr(TextModel, "forward", broken)
    with pytest.raises(FeatureError, match=r"NaN or infinite values for train row\(s\) \d"):
        trained(text_run("frozen", "mean"), hftl.TextClassification, max_length=11)  # nothing of it in the cache


def test_a_stop_keeps_the_features_and_the_same_command_ends_where_it_would_have(text_run, monkeypatch):
    run = text_run("frozen", "mean", num_epochs=2)
    whole = trained(run, hftl.TextClassification, FrozenConfig(), "whole")
    plain, steps = BatchedHeads.step, []

    def asked(self, *args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    monkeypatch.setattr(BatchedHeads, "step", asked)
    run = replace(run, resume="auto")
    with pytest.raises(Stopped, match="after step 5 of 16 of the head") as caught:
        trained(run, hftl.TextClassification, FrozenConfig(), "stopped")
    assert caught.value.exit_code == 75
    again = trained(run, hftl.TextClassification, FrozenConfig(), "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], again[:2], strict=True))
    assert again[2].records == whole[2].records and again[2].best == whole[2].best


def test_a_history_that_cannot_be_written_ends_the_run(text_run, monkeypatch):
    from hftl.run_folder.history import Recorder

    def full(self):
        self.file = open("/dev/full", "w")

    monkeypatch.setattr(Recorder, "_begin", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trained(text_run("frozen", "mean"), hftl.TextClassification)


def test_two_processes_train_the_head_of_one(texts, tiny_bert, tmp_path, forks):
    chosen = {"model.pooling": "mean", "train.num_epochs": 2, "train.head_lr": 1e-2, "train.trackers": "[]"}
    for world in (1, 2):
        out = tmp_path / f"on{world}"
        spec = flags(texts, tiny_bert, out, "frozen", **chosen, **{"train.batch_size_per_device": 8 // world})
        environment = {"HFTL_CACHE": str(tmp_path / f"cache{world}")}
        words = ["python", ROOT / "recipes" / "text_classification.py", *spec]
        statuses, said = forks.command(words, tmp_path, 120, world, **ENV, **environment)
        assert statuses == [0] * world, said[-3000:]
    one, two = (load_file(tmp_path / f"on{world}" / "model" / "model.safetensors") for world in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    tables = [json.loads((tmp_path / f"on{world}" / HEADS).read_text()) for world in (1, 2)]
    assert [row["kept"] for row in tables[0]] == [row["kept"] for row in tables[1]]
